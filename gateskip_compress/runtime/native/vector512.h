// Vectors of 512 bits, with VNNI: the V that `kernels_body.h` asks for. Included under the target of who includes it.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace gateskip {
namespace {

struct Avx512 {
  static constexpr int lanes = 16;
  template <int tokens>
  static constexpr bool fetched_ahead = true;
  typedef float F __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  // sum + v * x[0]
  static F add_times(F sum, F v, const float* x) {
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(v), "m"(*x));  // GCC would take a register for each x
    return sum;
  }
  static F bf16(const uint16_t* p) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static F f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F whole(I v) { return _mm512_cvtepi32_ps((__m512i)v); }
  static F bytes(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F signed_bytes(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }

  static int32_t sum(I v) { return _mm512_reduce_add_epi32((__m512i)v); }
  static int32_t most(I v) { return _mm512_reduce_max_epi32((__m512i)v); }
  static void put_bytes(int8_t* to, I v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)v));
  }
  static void put_f16(uint16_t* to, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  using Codes = __m512i;
  static Codes codes(const uint8_t* p) {
    __m512i both = _mm512_loadu_si512(p);
    asm("" : "+v"(both));  // GCC would read it twice
    return both;
  }
  static __m512i low(__m512i c) { return _mm512_and_si512(c, _mm512_set1_epi8(15)); }
  static __m512i high(__m512i c) { return low(_mm512_srli_epi16(c, 4)); }
  static constexpr bool direct = true;
  static I add_dots(I sum, __m512i w, const int8_t* q) {
    struct Quad {
      int8_t of[4];
    };
    // GCC would not take them from memory
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const Quad*>(q)));
    return sum;
  }
  static constexpr float middle8 = 0;
  static Codes codes8(const uint8_t* p) { return codes(p); }
  static constexpr bool paired = false;  // but for prompts
  template <int i>
  static I pairs4(const uint8_t* p) {
    const __m512i shifted = i == 0 ? codes(p) : _mm512_srli_epi16(codes(p), i == 1 ? 8 : i == 2 ? 4 : 12);
    return (I)(i == 3 ? shifted : _mm512_and_si512(shifted, _mm512_set1_epi16(15)));
  }
  static void put_crossed(int16_t* to, I v) {
    const __m512i crossed = _mm512_shuffle_epi32((__m512i)v, _MM_PERM_DBCA);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(crossed));
  }
  static I add_pairs(I sum, I w, const int16_t* x) {
    struct Two {
      int16_t of[2];
    };
    asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const Two*>(x)));
    return sum;
  }
  // What the two 16-bit halves of x are times those of w, added to each sum.
  static I add_products(I sum, I w, I x) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
  }
  // w + the 32 bits at x
  static I plus(I w, const void* x) {
    struct Four {
      int8_t of[4];
    };
    asm("vpaddd %2%{1to16%}, %1, %0" : "=v"(w) : "v"(w), "m"(*static_cast<const Four*>(x)));
    return w;
  }
  // Products of each two that are next to each other, positive, in the lower one's place.
  static I neighbours(I v) { return (I)_mm512_mul_epu32((__m512i)v, _mm512_srli_epi64((__m512i)v, 32)); }
  static I less(I a, I b) { return (I)_mm512_sub_epi16((__m512i)a, (__m512i)b); }
  static I whole_at(const uint8_t* p) { return (I)_mm512_load_si512(p); }
  static void put_whole(uint8_t* to, I v) { _mm512_store_si512(to, (__m512i)v); }
};

}  // namespace
}  // namespace gateskip
