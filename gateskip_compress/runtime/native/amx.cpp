// Kernels for AVX-512 whose products of a few tokens and more are AMX's, of tiles of up to 16 tokens, a span of columns
// and 16 rows. A tile's sums are whole numbers, and what is done to them is what `coded_block` does, in its order: the
// bits are those of AVX-512 alone.
#include "kernels.h"
#include "room.h"

#if GATESKIP_AMX
#if !defined(__clang__)  // GCC 12 takes its own undefined vectors in this header for ours
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,amx-tile,amx-int8"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,amx-tile,amx-int8")
#endif
#include "kernels_body.h"
#include "tiles.h"
#include "vector512.h"

namespace gateskip {
namespace {

using V = Avx512;

constexpr int kTile = 16;                   // tokens of a tile
constexpr int kFewest = 5;                  // that tiles are worth it for
constexpr int kWeights = kSpan * V::lanes;  // bytes of a tile

struct Rooms {
  Room<int8_t> inputs;
  Room<float> scales, shifts;
  Room<uint8_t> codes;
};

Rooms& own_rooms() {
  thread_local Rooms rooms;
  return rooms;
}

// The codes of a span times those of T tokens: sums of `q`, then of `fine`.
template <bool fine, int T>
inline __attribute__((always_inline)) void tile_dots(const int8_t* inputs, const uint8_t* codes,
                                                     int32_t (&sums)[2][T * V::lanes]) {
  _tile_loadd(4, inputs, kSpan);
  _tile_loadd(3, codes, 4 * V::lanes);
  _tile_zero(0);
  _tile_dpbsud(0, 4, 3);
  if constexpr (fine) {
    _tile_loadd(5, inputs + T * kSpan, kSpan);
    _tile_zero(1);
    _tile_dpbsud(1, 5, 3);
  }
  _tile_stored(0, sums[0], 4 * V::lanes);
  if constexpr (fine) _tile_stored(1, sums[1], 4 * V::lanes);
}

// What tiles read of the tokens: by tile and span, a row of `q` for each token, and then of `fine`; by tile and span,
// scales; by tile and group, the sums that zero points are multiplied by.
struct Inputs {
  int8_t* codes;
  float *scales, *shifts;
  int spans, groups, tiles;
};

template <bool fine, int T>
Inputs gather(const Matrix& m, const Activations& a, const int* tokens, int count, Rooms& rooms) {
  Inputs in;
  in.spans = m.columns / kSpan, in.groups = groups(m), in.tiles = (count + T - 1) / T;
  const int per_group = m.group / kSpan, size = (fine ? 2 : 1) * T * kSpan;
  in.codes = rooms.inputs.of(size_t(in.tiles) * in.spans * size);
  in.scales = rooms.scales.of(size_t(in.tiles) * in.spans * T);
  in.shifts = rooms.shifts.of(size_t(in.tiles) * in.groups * T);
  for (int i = 0; i < count; ++i) {
    const int tile = i / T, t = i % T;
    size_t from = size_t(tokens[i]) * a.chunks(), to = size_t(tile) * in.spans;
    float* shift = in.shifts + size_t(tile) * in.groups * T + t;
    for (int span = 0; span < in.spans; shift += T) {
      float sum = 0;
      for (const int end = std::min(span + per_group, in.spans); span < end; ++span, ++to) {
        int8_t* row = in.codes + to * size + t * kSpan;
        std::memcpy(row, a.q + from * kChunk, kSpan);
        if constexpr (fine) std::memcpy(row + T * kSpan, a.fine + from * kChunk, kSpan);
        in.scales[to * T + t] = a.scale[from];
        for (int chunk = 0; chunk < kSpan / kChunk; ++chunk) sum += a.sum[from++];
      }
      *shift = sum;
    }
  }
  written();
  return in;
}

// A block of rows times T tokens or fewer. Tiles are a span ahead of what their sums are scaled with. Where a group is one
// span, all there is to a token is one vector, and 16 of them stay in registers.
template <Kind K, bool fine, int T, bool group_is_span>
void tile_block(const Matrix& m, int block, const Inputs& in, int tile, const uint8_t* codes, const int* tokens,
                int count, const Outputs& out) {
  using C = Coded<V, K>;
  const int per_group = group_is_span ? 1 : m.group / kSpan, group_bytes = 5 * V::lanes + per_group * 2 * C::bytes;
  const uint8_t* packed = m.data + block * block_bytes(m, V::lanes);
  alignas(64) int32_t sums[2][2][T * V::lanes];
  const auto multiply_span = [&](int span) {
    const uint8_t* own = K == Kind::int4 ? codes + size_t(span) * kWeights
                                         : packed + size_t(span / per_group) * group_bytes + 5 * V::lanes +
                                               span % per_group * 2 * C::bytes;
    tile_dots<fine, T>(in.codes + (size_t(tile) * in.spans + span) * (fine ? 2 : 1) * T * kSpan, own, sums[span % 2]);
  };
  // the first tile fetches the next block
  const size_t size = block_bytes(m, V::lanes), fetched = tile ? 0 : size / in.spans + 1;
  F<V> y[T], part[T];
  unrolled<T>([&](auto t) { y[t] = start<V>(m, block), part[t] = V::set(0); });
  multiply_span(0);
  for (int span = 0; span < in.spans; ++span) {
    for (size_t i = 0; i < fetched; i += 64) __builtin_prefetch(packed + size + span * fetched + i);
    if (span + 1 < in.spans) multiply_span(span + 1);
    const int group = span / per_group;
    const float* scales = in.scales + (size_t(tile) * in.spans + span) * T;
    const auto& own = sums[span % 2];
    unrolled<T>([&](auto t) {
      const auto sum = [&](int of) { return V::whole((V::I)_mm512_load_si512(own[of] + t * V::lanes)); };
      F<V> dots = sum(0);
      if constexpr (fine) dots = V::fma(dots, V::set(kCoarser), sum(1));
      part[t] = V::fma(dots, V::set(scales[t]), part[t]);
    });
    if (!group_is_span && span % per_group != per_group - 1 && span != in.spans - 1) continue;
    const float* shifts = in.shifts + (size_t(tile) * in.groups + group) * T;
    const uint8_t* at = packed + size_t(group) * group_bytes;
    const F<V> s = V::load(reinterpret_cast<const float*>(at)), z = V::bytes(at + 4 * V::lanes) - V::set(C::middle);
    unrolled<T>([&](auto t) {
      y[t] = V::fma(V::fma(-z, V::set(shifts[t]), part[t]), s, y[t]);
      part[t] = V::set(0);
    });
  }
  unrolled<T>([&](auto t) {
    if (t < count) put<V>(m, block, y[t], out, tokens[t]);
  });
}

// A block's codes of 4 bits to bytes, by span.
void spread(const Matrix& m, int block, uint8_t* to) {
  using C = Coded<V, Kind::int4>;
  const uint8_t* at = m.data + block * block_bytes(m, V::lanes);
  for (int column = 0; column < m.columns;) {
    at += 5 * V::lanes;
    const int end = std::min(column + m.group, m.columns);
    for (; column < end; column += kChunk, at += C::bytes, to += kWeights / 2) {
      typename V::Codes codes[8];
      load_chunk<C>(at, codes);
      for (int i = 0; i < 8; ++i) _mm512_store_si512(to + 4 * V::lanes * i, codes[i]);
    }
  }
  written();
}

template <Kind K, bool fine, int T>
void multiply_blocks(const Product& product, const Inputs& in, const int* tokens, int count, Rooms& rooms) {
  const Matrix& m = *product.matrix;
  uint8_t* codes = K == Kind::int4 ? rooms.codes.of(size_t(in.spans) * kWeights) : nullptr;
  const auto times = m.group == kSpan ? tile_block<K, fine, T, true> : tile_block<K, fine, T, false>;
  for (int block = product.begin; block < product.end; ++block) {
    if constexpr (K == Kind::int4) spread(m, block, codes);
    for (int tile = 0; tile < in.tiles; ++tile)
      times(m, block, in, tile, codes, tokens + tile * T, std::min(T, count - tile * T), product.out);
  }
}

template <bool fine, int T>
void multiply_tiles(const Product* products, int number, const Activations& a, const int* tokens, int count) {
  Rooms& rooms = own_rooms();
  Inputs in;
  shape_tiles({T, T, 0, kSpan / 4, T, T});  // sums, weights, activations
  for (int i = 0; i < number; ++i) {
    const Matrix& m = *products[i].matrix;
    if (i == 0 || m.group != products[i - 1].matrix->group) in = gather<fine, T>(m, a, tokens, count, rooms);
    m.kind == Kind::int4 ? multiply_blocks<Kind::int4, fine, T>(products[i], in, tokens, count, rooms)
                         : multiply_blocks<Kind::int8, fine, T>(products[i], in, tokens, count, rooms);
  }
  _tile_release();
}

void multiply_some(const Product* products, int number, const Activations& a, const int* tokens, int count) {
  const bool tiles = count >= kFewest && std::all_of(products, products + number, [](const Product& product) {
    const Matrix& m = *product.matrix;
    return (m.kind == Kind::int4 || m.kind == Kind::int8) && whole_spans(m);
  });
  if (!tiles) return multiply<V>(products, number, a, tokens, count);
  const auto times = [&](auto T) {
    return a.fine ? multiply_tiles<true, T>(products, number, a, tokens, count)
                  : multiply_tiles<false, T>(products, number, a, tokens, count);
  };
  if (count <= 8) return times(std::integral_constant<int, 8>());
  return times(std::integral_constant<int, kTile>());
}

constexpr Kernels tiled() {
  Kernels kernels = table<V>("amx");
  kernels.multiply = multiply_some;
  kernels.prompts = &amx_prompts;
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
