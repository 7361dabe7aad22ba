// Packs weights into the layout that `kernels.h` describes.
#pragma once

#include "kernels.h"

namespace gateskip {

// Codes (rows, columns), one byte each; scales and zero points (rows, groups). `to` holds all blocks, and is zeros. Scales
// are kept as float16 where the matrix says so: they must be such.
void pack_codes(const Matrix& shape, int lanes, const uint8_t* codes, const float* scale, const uint8_t* zero,
                uint8_t* to);
// Floats (rows, columns), kept as they are or rounded to bf16.
void pack_floats(const Matrix& shape, int lanes, const float* weight, uint8_t* to);
// A row of packed codes as floats again: scale * (code - zero point).
void unpack_row(const Matrix& m, int lanes, int row, float* to);

// To the nearest bf16, ties to even.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  static_assert(sizeof bits == sizeof value);
  __builtin_memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 64);  // rounding could make it infinite
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bf16(const void* at) {
  uint16_t half;
  __builtin_memcpy(&half, at, sizeof half);
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// To the nearest f16, ties to even; what is too large becomes the largest.
inline uint16_t to_f16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7bff);
  if (size < 0x38800000) {  // below the normal numbers: adding 1/2 leaves the code in the last bits
    float shifted;
    __builtin_memcpy(&shifted, &size, sizeof shifted);
    shifted += 0.5f;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}

inline float from_f16(const void* at) {
  uint16_t half;
  __builtin_memcpy(&half, at, sizeof half);
  const uint32_t size = half & 0x7fff;
  // with the exponent where float has it, 112 too low; above the numbers, where both have infinity
  const uint32_t shifted = size << 13, beyond = size >= 0x7c00 ? 0x7f800000 : 0, sign = uint32_t(half & 0x8000) << 16;
  float value;
  __builtin_memcpy(&value, &shifted, sizeof value);
  value *= 0x1p112f;
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  bits |= beyond | sign;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace gateskip
