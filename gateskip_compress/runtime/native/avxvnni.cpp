// Kernels for AVX-VNNI: as AVX2, but four products are added to a 32-bit sum at once.
#include "kernels.h"
#include "room.h"

#if GATESKIP_X86
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#include "kernels_body.h"
#include "prompts_body.h"
#include "vector256.h"

namespace gateskip {
namespace {

struct AvxVnni : Avx2 {
  static constexpr bool direct = true;
  static I add_dots(I sum, __m256i w, const int8_t* q) {
    return (I)in_order(_mm256_dpbusd_avx_epi32((__m256i)sum, w, quad(q)));
  }
  static constexpr float middle8 = 0;
  static Codes codes8(const uint8_t* p) { return codes(p); }
  static constexpr bool paired = false;  // but for prompts
  static I add_pairs(I sum, I w, const int16_t* x) {
    return (I)in_order(_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)w, two(x)));
  }
};

}  // namespace

const Kernels avxvnni_kernels = table<AvxVnni>("avxvnni", &prompts_by<AvxVnni, Way::pairs>);

}  // namespace gateskip

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
