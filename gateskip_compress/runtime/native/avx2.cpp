// Kernels for AVX2.
#include "kernels.h"
#include "room.h"

#if GATESKIP_X86
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "kernels_body.h"
#include "prompts_body.h"
#include "vector256.h"

namespace gateskip {

const Kernels avx2_kernels = table<Avx2>("avx2", &prompts_by<Avx2, Way::pairs>);

}  // namespace gateskip

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
