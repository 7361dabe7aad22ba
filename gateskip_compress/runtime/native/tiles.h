// AMX's registers. Included under the target of who includes it, as a file of kernels.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace gateskip {
namespace {

// Gives each register so many rows of 64 bytes.
inline void shape_tiles(const uint8_t (&rows_of)[8]) {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  for (int i = 0; i < 8; ++i) shapes.rows[i] = rows_of[i], shapes.bytes[i] = rows_of[i] ? 64 : 0;
  asm volatile("" : : "r"(&shapes) : "memory");  // GCC 12 does not see that the next line reads all of it
  _tile_loadconfig(&shapes);
}

// GCC 12 does not see that tiles read what was written before.
inline void written() { asm volatile("" : : : "memory"); }

}  // namespace
}  // namespace gateskip
