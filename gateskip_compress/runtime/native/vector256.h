// Vectors of 256 bits: the V that `kernels_body.h` asks for. Included under the target of who includes it.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace gateskip {
namespace {

struct Avx2 {
  static constexpr int lanes = 8;
  template <int tokens>
  static constexpr bool fetched_ahead = true;
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F add_times(F sum, F v, const float* x) { return fma(v, set(*x), sum); }  // sum + v * x[0]
  static F bf16(const uint16_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static F f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F whole(I v) { return _mm256_cvtepi32_ps((__m256i)v); }
  static F bytes(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F signed_bytes(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }

  static int32_t sum(I v) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    four = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 1)));
  }
  static int32_t most(I v) {
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    four = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 1)));
  }
  static __m128i shorts(I v) {
    return _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  }
  static void put_bytes(int8_t* to, I v) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(shorts(v), shorts(v)));
  }
  static void put_f16(uint16_t* to, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  using Codes = __m256i;
  static Codes codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256i low(__m256i c) { return _mm256_and_si256(c, _mm256_set1_epi8(15)); }
  static __m256i high(__m256i c) { return low(_mm256_srli_epi16(c, 4)); }
  static __m256i quad(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, 4);
    return _mm256_set1_epi32(four);
  }
  // GCC would add up in a tree, whose leaves are more than there are registers.
  static __m256i in_order(__m256i sum) {
    asm("" : "+x"(sum));
    return sum;
  }
  static constexpr bool direct = false;
  // 16-bit sums: 8 products of two columns are at most 8 * 2 * 15 * 127 = 30480.
  struct Sum4 {
    __m256i sum, narrow;
    Sum4() : sum(_mm256_setzero_si256()), narrow(sum) {}
    void add(__m256i w, __m256i q) { narrow = in_order(_mm256_add_epi16(narrow, _mm256_maddubs_epi16(w, q))); }
    void widen() {
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
      narrow = _mm256_setzero_si256();
    }
    F value() const { return _mm256_cvtepi32_ps(sum); }
  };
  static constexpr float middle8 = 128;
  static Codes codes8(const uint8_t* p) { return _mm256_xor_si256(codes(p), _mm256_set1_epi8(-128)); }
  // As size and sign, so that two products, 2 * 128 * 127 at most, fit 16 bits.
  struct Sum8 {
    __m256i sum;
    Sum8() : sum(_mm256_setzero_si256()) {}
    void add(__m256i w, __m256i q) {
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(q, w));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    void widen() {}
    F value() const { return _mm256_cvtepi32_ps(sum); }
  };
  // Two columns' codes of each row, in 16 bits: 0 and 2, then 1 and 3 of the first four, then of those in high halves.
  static constexpr bool paired = true;
  template <int i>
  static I pairs4(const uint8_t* p) {
    const __m256i shifted = i == 0 ? codes(p) : _mm256_srli_epi16(codes(p), i == 1 ? 8 : i == 2 ? 4 : 12);
    return (I)(i == 3 ? shifted : _mm256_and_si256(shifted, _mm256_set1_epi16(15)));
  }
  template <int i>
  static I pairs8(const uint8_t* p) {
    return (I)_mm256_srai_epi16(i == 0 ? _mm256_slli_epi16(codes8(p), 8) : codes8(p), 8);
  }
  static void put_crossed(int16_t* to, I v) {
    const I crossed = (I)_mm256_shuffle_epi32((__m256i)v, 0b11011000);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), shorts(crossed));
  }
  // A chunk's sum, 32 products of 128 * 32639 at most, fits 32 bits.
  static I add_pairs(I sum, I w, const int16_t* x) {
    // in place, and in order: GCC would move every sum
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16((__m256i)w, two(x))));
    return sum;
  }
  static __m256i two(const int16_t* x) {
    int32_t both;
    std::memcpy(&both, x, 4);
    return _mm256_set1_epi32(both);
  }
  static I less(I a, I b) { return (I)_mm256_sub_epi16((__m256i)a, (__m256i)b); }
  static I whole_at(const uint8_t* p) { return (I)_mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
  static void put_whole(uint8_t* to, I v) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), (__m256i)v); }
};

}  // namespace
}  // namespace gateskip
