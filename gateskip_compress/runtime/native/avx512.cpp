// Kernels for AVX-512 with VNNI.
#include "kernels.h"
#include "room.h"

#if GATESKIP_X86
#if !defined(__clang__)  // GCC 12 takes its own undefined vectors in this header for ours
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")
#endif
#include "kernels_body.h"
#include "prompts_body.h"
#include "vector512.h"

namespace gateskip {
namespace {

// AMD's, which add on ports that multiplications leave alone, and follow what one token reads by themselves.
struct Zen4 : Avx512 {
  template <int tokens>
  static constexpr bool fetched_ahead = tokens > 1;
};

}  // namespace

const Kernels avx512_kernels = table<Avx512>("avx512vnni", &prompts_by<Avx512, Way::pairs>);
const Kernels zen4_kernels = table<Zen4>("zen4", &prompts_by<Zen4, Way::sums>);

}  // namespace gateskip

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
