// Kernels for AVX-512 whose products of many tokens are AMX's, of tiles of 16 tokens, a span of columns and 16 rows.
//
// A tile's sums are whole numbers, and what is done to them is what `coded_block` does, in its order: the bits are those
// of AVX-512 alone.
#include "kernels.h"

#if GATESKIP_X86 && defined(__linux__)
#if !defined(__clang__)  // GCC 12 takes its own undefined vectors in this header for ours
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,amx-tile,amx-int8")
#endif
#include "kernels_body.h"
#include "vector512.h"

namespace gateskip {
namespace {

using V = Avx512;

constexpr int kTokens = 16;                  // of a tile
constexpr int kTile = kTokens * kSpan;       // bytes
constexpr int kSums = kTokens * V::lanes;    // of a tile
constexpr int kFewest = 8;                   // tokens that tiles are worth it for

// Memory that grows and stays.
template <class T>
class Room {
 public:
  T* of(size_t count) {
    if (count > size_) {
      held_.reset(new uint8_t[count * sizeof(T) + 64]);
      size_ = count;
    }
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(held_.get()) + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<uint8_t[]> held_;
  size_t size_ = 0;
};

struct Rooms {
  Room<int8_t> inputs;
  Room<float> scales, shifts;
  Room<uint8_t> codes;
};

// Registers 0 and 1 hold sums, 3 weights, 4 and 5 activations; all of 16 rows of 64 bytes.
inline void shape_tiles() {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shapes;
  asm volatile("" : : "r"(&shapes) : "memory");  // GCC 12 does not see that the next line reads all of it
  _tile_loadconfig(&shapes);
}

// The codes of a span times those of 16 tokens: sums of `q`, then of `fine`.
template <bool fine>
inline __attribute__((always_inline)) void tile_dots(const int8_t* inputs, const uint8_t* codes,
                                                     int32_t (&sums)[2][kSums]) {
  _tile_loadd(4, inputs, kSpan);
  _tile_loadd(3, codes, 4 * V::lanes);
  _tile_zero(0);
  _tile_dpbsud(0, 4, 3);
  if constexpr (fine) {
    _tile_loadd(5, inputs + kTile, kSpan);
    _tile_zero(1);
    _tile_dpbsud(1, 5, 3);
  }
  _tile_stored(0, sums[0], 4 * V::lanes);
  if constexpr (fine) _tile_stored(1, sums[1], 4 * V::lanes);
}

// What tiles read of the tokens: by 16 tokens and a span, 16 rows of `q` and 16 of `fine`; their scales, and the sums
// that zero points are multiplied by, of a group.
struct Inputs {
  int8_t* codes;
  float *scales, *shifts;
  int spans, groups, tiles;
};

template <bool fine>
Inputs gather(const Matrix& m, const Activations& a, const int* tokens, int count, Rooms& rooms) {
  Inputs in;
  in.spans = m.columns / kSpan, in.groups = groups(m), in.tiles = (count + kTokens - 1) / kTokens;
  const int per_group = m.group / kSpan, size = (fine ? 2 : 1) * kTile;
  in.codes = rooms.inputs.of(size_t(in.tiles) * in.spans * size);
  in.scales = rooms.scales.of(size_t(in.tiles) * in.spans * kTokens);
  in.shifts = rooms.shifts.of(size_t(in.tiles) * in.groups * kTokens);
  for (int t = 0; t < count; ++t) {
    float shift = 0;
    for (int span = 0; span < in.spans; ++span) {
      const size_t from = size_t(tokens[t]) * a.chunks() + span * (kSpan / kChunk);
      const size_t to = size_t(t / kTokens) * in.spans + span;
      std::memcpy(in.codes + to * size + t % kTokens * kSpan, a.q + from * kChunk, kSpan);
      if constexpr (fine)
        std::memcpy(in.codes + to * size + kTile + t % kTokens * kSpan, a.fine + from * kChunk, kSpan);
      in.scales[to * kTokens + t % kTokens] = a.scale[from];
      if (span % per_group == 0) shift = 0;
      for (int chunk = 0; chunk < kSpan / kChunk; ++chunk) shift += a.sum[from + chunk];
      in.shifts[(size_t(t / kTokens) * in.groups + span / per_group) * kTokens + t % kTokens] = shift;
    }
  }
  return in;
}

// A block of rows times 16 tokens or fewer. Tiles are a span ahead of what their sums are scaled with. Where a group is
// one span, all there is to a token is one vector, and 16 of them stay in registers.
template <Kind K, bool fine, bool group_is_span>
void tile_block(const Matrix& m, int block, const Inputs& in, int tile, const uint8_t* codes, const int* tokens,
                int count, float* out, size_t stride) {
  using C = Coded<V, K>;
  const int per_group = group_is_span ? 1 : m.group / kSpan, group_bytes = 5 * V::lanes + per_group * 2 * C::bytes;
  const uint8_t* packed = m.data + block * block_bytes(m, V::lanes);
  alignas(64) int32_t sums[2][2][kSums];
  const auto multiply_span = [&](int span) {
    const uint8_t* own = K == Kind::int4 ? codes + size_t(span) * kTile
                                         : packed + size_t(span / per_group) * group_bytes + 5 * V::lanes +
                                               span % per_group * 2 * C::bytes;
    tile_dots<fine>(in.codes + (size_t(tile) * in.spans + span) * (fine ? 2 : 1) * kTile, own, sums[span % 2]);
  };
  F<V> y[kTokens], part[kTokens];
  unrolled<kTokens>([&](auto t) { y[t] = start<V>(m, block), part[t] = V::set(0); });
  multiply_span(0);
  for (int span = 0; span < in.spans; ++span) {
    if (span + 1 < in.spans) multiply_span(span + 1);
    const int group = span / per_group;
    const float* scales = in.scales + (size_t(tile) * in.spans + span) * kTokens;
    const auto& own = sums[span % 2];
    unrolled<kTokens>([&](auto t) {
      F<V> dots = V::whole(own[0] + t * V::lanes);
      if constexpr (fine) dots = V::fma(dots, V::set(kCoarser), V::whole(own[1] + t * V::lanes));
      part[t] = V::fma(dots, V::set(scales[t]), part[t]);
    });
    if (!group_is_span && span % per_group != per_group - 1 && span != in.spans - 1) continue;
    const float* shifts = in.shifts + (size_t(tile) * in.groups + group) * kTokens;
    const uint8_t* at = packed + size_t(group) * group_bytes;
    const F<V> s = V::load(reinterpret_cast<const float*>(at)), z = V::bytes(at + 4 * V::lanes) - V::set(C::middle);
    unrolled<kTokens>([&](auto t) {
      y[t] = V::fma(V::fma(-z, V::set(shifts[t]), part[t]), s, y[t]);
      part[t] = V::set(0);
    });
  }
  unrolled<kTokens>([&](auto t) {
    if (t < count) put<V>(m, block, y[t], out + tokens[t] * stride);
  });
}

// A block's codes of 4 bits to bytes, by span.
void spread(const Matrix& m, int block, uint8_t* to) {
  using C = Coded<V, Kind::int4>;
  const uint8_t* at = m.data + block * block_bytes(m, V::lanes);
  for (int column = 0; column < m.columns;) {
    at += 5 * V::lanes;
    const int end = std::min(column + m.group, m.columns);
    for (; column < end; column += kChunk, at += C::bytes, to += kTile / 2) {
      for (int ahead = 0; ahead < C::bytes; ahead += 64) __builtin_prefetch(at + kAhead + ahead);
      typename V::Codes codes[8];
      C::load(at, codes);
      for (int i = 0; i < 8; ++i) _mm512_store_si512(to + 4 * V::lanes * i, codes[i]);
    }
  }
  asm volatile("" : : : "memory");  // nor that tiles read this
}

template <Kind K, bool fine>
void multiply_tiles(const Matrix& m, int begin, int end, const Activations& a, const int* tokens, int count,
                    float* out, size_t stride) {
  thread_local Rooms rooms;
  const Inputs in = gather<fine>(m, a, tokens, count, rooms);
  uint8_t* codes = K == Kind::int4 ? rooms.codes.of(size_t(in.spans) * kTile) : nullptr;
  const auto times = m.group == kSpan ? tile_block<K, fine, true> : tile_block<K, fine, false>;
  shape_tiles();
  for (int block = begin; block < end; ++block) {
    if constexpr (K == Kind::int4) spread(m, block, codes);
    for (int tile = 0; tile < in.tiles; ++tile) {
      const int first = tile * kTokens, some = std::min(kTokens, count - first);
      times(m, block, in, tile, codes, tokens + first, some, out, stride);
    }
  }
  _tile_release();
}

void multiply_many(const Matrix& m, int begin, int end, const Activations& a, const int* tokens, int count, float* out,
                   size_t stride) {
  const bool floats = m.kind == Kind::bf16 || m.kind == Kind::f32;
  if (floats || count < kFewest || !spans(m) || m.columns % kSpan)
    return multiply<V>(m, begin, end, a, tokens, count, out, stride);
  const auto of_kind = [&](auto kind) {
    constexpr Kind K = decltype(kind)::value;
    return a.fine ? multiply_tiles<K, true>(m, begin, end, a, tokens, count, out, stride)
                  : multiply_tiles<K, false>(m, begin, end, a, tokens, count, out, stride);
  };
  if (m.kind == Kind::int4) return of_kind(std::integral_constant<Kind, Kind::int4>());
  return of_kind(std::integral_constant<Kind, Kind::int8>());
}

constexpr Kernels tiled() {
  Kernels kernels = table<V>("amx");
  kernels.multiply = multiply_many;
  return kernels;
}

}  // namespace

const Kernels amx_kernels = tiled();

}  // namespace gateskip

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
