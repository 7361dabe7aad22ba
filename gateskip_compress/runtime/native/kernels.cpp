// Which kernels a processor can run, and how weights are packed for them.
#include "kernels.h"

#if GATESKIP_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstring>

#include "pack.h"

namespace gateskip {

#if GATESKIP_AMX
namespace {

// Linux saves AMX's registers only for a process that has asked for it.
bool may_use_amx() {
  unsigned a, b, c, features;
  constexpr unsigned tiles = 1u << 24, int8 = 1u << 25, bf16 = 1u << 22;
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &features) || ~features & (tiles | int8 | bf16)) return false;
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

}  // namespace
#endif

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> found;
#if GATESKIP_X86
  // asked here, where nothing is compiled for a processor that may not be there
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
#if GATESKIP_AMX
      static const bool amx = __builtin_cpu_supports("avx512bf16") && may_use_amx();
      if (amx) found.push_back(&amx_kernels);
#endif
      const bool amd = __builtin_cpu_is("amd");
      found.push_back(amd ? &zen4_kernels : &avx512_kernels);
      found.push_back(amd ? &avx512_kernels : &zen4_kernels);
    }
    if (__builtin_cpu_supports("avxvnni")) found.push_back(&avxvnni_kernels);
    found.push_back(&avx2_kernels);
  }
#endif
  found.push_back(&portable_kernels);
  return found;
}

void pack_codes(const Matrix& m, int lanes, const uint8_t* codes, const float* scale, const uint8_t* zero,
                uint8_t* to) {
  const int step = m.kind == Kind::int4 ? 8 : 4, all = padded(m.columns, kChunk);
  for (int row = 0; row < m.rows; ++row) {
    const int lane = row % lanes;
    uint8_t* at = to + row / lanes * block_bytes(m, lanes);
    for (int group = 0; group < groups(m); ++group) {
      const float own = scale[size_t(row) * groups(m) + group];
      if (m.short_scales) {
        const uint16_t half = to_f16(own);
        std::memcpy(at + 2 * lane, &half, 2);
      } else {
        std::memcpy(at + 4 * lane, &own, 4);
      }
      at[zeros_at(m, lanes) + lane] = zero[size_t(row) * groups(m) + group];
      at += codes_at(m, lanes);
      const int end = std::min((group + 1) * m.group, all);
      for (int column = group * m.group; column < end; column += step, at += 4 * lanes)
        for (int i = 0; i < step && column + i < m.columns; ++i) {
          const uint8_t code = codes[size_t(row) * m.columns + column + i];
          at[4 * lane + i % 4] |= i < 4 ? code : code << 4;
        }
    }
  }
}

void unpack_row(const Matrix& m, int lanes, int row, float* to) {
  const bool four = m.kind == Kind::int4;
  const int all = padded(m.columns, kChunk), lane = row % lanes;
  const uint8_t* at = m.data + row / lanes * block_bytes(m, lanes);
  uint8_t codes[kChunk];  // gathered first: each lies in another cache line, and these are to come at once
  for (int group = 0; group < groups(m); ++group) {
    float scale;
    if (m.short_scales)
      scale = from_f16(at + 2 * lane);
    else
      std::memcpy(&scale, at + 4 * lane, 4);
    const int zero = at[zeros_at(m, lanes) + lane], end = std::min((group + 1) * m.group, all);
    at += codes_at(m, lanes);
    for (int column = group * m.group; column < end; column += kChunk) {
      for (int i = 0; i < kChunk; at += 4 * lanes) {
        uint32_t quad;
        std::memcpy(&quad, at + 4 * lane, 4);
        for (int half = 0; half <= four; ++half, i += 4) {
          const uint32_t own = four ? quad >> 4 * half & 0x0f0f0f0f : quad;
          std::memcpy(codes + i, &own, 4);
        }
      }
      const int count = std::min(kChunk, m.columns - column);
      for (int i = 0; i < count; ++i) to[column + i] = scale * static_cast<float>(codes[i] - zero);
    }
  }
}

void pack_floats(const Matrix& m, int lanes, const float* weight, uint8_t* to) {
  for (int row = 0; row < m.rows; ++row)
    for (int column = 0; column < m.columns; ++column) {
      const size_t place = (row / lanes * size_t(m.columns) + column) * lanes + row % lanes;
      const float value = weight[size_t(row) * m.columns + column];
      if (m.kind == Kind::bf16) {
        const uint16_t half = to_bf16(value);
        std::memcpy(to + 2 * place, &half, 2);
      } else {
        std::memcpy(to + 4 * place, &value, 4);
      }
    }
}

}  // namespace gateskip
