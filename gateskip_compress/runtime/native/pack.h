// Packs weights into the layout that `kernels.h` describes.
#pragma once

#include "kernels.h"

namespace gateskip {

// Codes (rows, columns), one byte each; scales and zero points (rows, groups). `to` holds all blocks, and is zeros.
void pack_codes(const Matrix& shape, int lanes, const uint8_t* codes, const float* scale, const uint8_t* zero,
                uint8_t* to);
// Floats (rows, columns), kept as they are or rounded to bf16.
void pack_floats(const Matrix& shape, int lanes, const float* weight, uint8_t* to);

// To the nearest bf16, ties to even.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  static_assert(sizeof bits == sizeof value);
  __builtin_memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 64);  // rounding could make it infinite
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace gateskip
