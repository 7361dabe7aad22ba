// Kernels for AVX-512 whose products of a few tokens and more are AMX's, of tiles of up to 8 tokens, a span of columns
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

constexpr int kTile = 8;                    // tokens of a tile
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

// Rows of a tile of tokens: those of `q`, then of `fine`.
template <bool fine>
constexpr int kRows = (fine ? 2 : 1) * kTile;

// What tiles read of the tokens: by tile and span, rows of codes, and scales; by tile and group, the sums that zero
// points are multiplied by.
struct Inputs {
  int8_t* codes;
  float *scales, *shifts;
  int spans, groups, tiles;
};

template <bool fine>
Inputs gather(const Matrix& m, const Activations& a, const int* tokens, int count, Rooms& rooms) {
  Inputs in;
  in.spans = m.columns / kSpan, in.groups = groups(m), in.tiles = (count + kTile - 1) / kTile;
  const int per_group = m.group / kSpan, size = kRows<fine> * kSpan;
  in.codes = rooms.inputs.of(size_t(in.tiles) * in.spans * size);
  in.scales = rooms.scales.of(size_t(in.tiles) * in.spans * kTile);
  in.shifts = rooms.shifts.of(size_t(in.tiles) * in.groups * kTile);
  for (int i = 0; i < count; ++i) {
    const int tile = i / kTile, t = i % kTile;
    size_t from = size_t(tokens[i]) * a.chunks(), to = size_t(tile) * in.spans;
    float* shift = in.shifts + size_t(tile) * in.groups * kTile + t;
    for (int span = 0; span < in.spans; shift += kTile) {
      float sum = 0;
      for (const int end = std::min(span + per_group, in.spans); span < end; ++span, ++to) {
        int8_t* row = in.codes + to * size + t * kSpan;
        std::memcpy(row, a.q + from * kChunk, kSpan);
        if constexpr (fine) std::memcpy(row + kTile * kSpan, a.fine + from * kChunk, kSpan);
        in.scales[to * kTile + t] = a.scale[from];
        for (int chunk = 0; chunk < kSpan / kChunk; ++chunk) sum += a.sum[from++];
      }
      *shift = sum;
    }
  }
  written();
  return in;
}

// A span's codes of 4 bits to bytes.
inline __attribute__((always_inline)) void spread(const uint8_t* at, uint8_t* to) {
  using C = Coded<V, Kind::int4>;
  for (int chunk = 0; chunk < kSpan / kChunk; ++chunk, at += C::bytes, to += kWeights / 2) {
    typename V::Codes codes[8];
    load_chunk<C>(at, codes);
    for (int i = 0; i < 8; ++i) _mm512_store_si512(to + 4 * V::lanes * i, codes[i]);
  }
  written();
}

// Of two spans under way, one has these registers, the other those: they are part of an instruction.
template <int odd>
inline __attribute__((always_inline)) void multiply_span(const int8_t* inputs, const uint8_t* codes) {
  if constexpr (odd) {
    _tile_loadd(3, codes, 4 * V::lanes);
    _tile_loadd(5, inputs, kSpan);
    _tile_zero(1);
    _tile_dpbsud(1, 5, 3);
  } else {
    _tile_loadd(2, codes, 4 * V::lanes);
    _tile_loadd(4, inputs, kSpan);
    _tile_zero(0);
    _tile_dpbsud(0, 4, 2);
  }
}

template <int odd>
inline __attribute__((always_inline)) void store_sums(int32_t* to) {
  if constexpr (odd)
    _tile_stored(1, to, 4 * V::lanes);
  else
    _tile_stored(0, to, 4 * V::lanes);
}

// How far a step has come: through blocks of rows, for each of them through tiles of tokens, for each of these through
// spans.
template <Kind K>
struct Place {
  const Matrix& m;
  const Inputs& in;
  const int per_group;
  int block;
  const uint8_t* at = m.data + block * block_bytes(m, V::lanes);  // weights
  int tile = 0, span = 0, left = 0;                               // spans left of a group
  size_t input = 0;                                               // of all tiles' spans

  // The span's codes, behind what a group begins with.
  const uint8_t* codes() const { return left ? at : at + codes_at(m, V::lanes); }
  bool ends_tile() const { return span == in.spans - 1; }
  bool ends_group() const { return left == 1 || ends_tile(); }  // of several spans

  void go_on() {
    at = codes() + 2 * Coded<V, K>::bytes, left = (left ? left : per_group) - 1, ++input;
    if (++span < in.spans) return;
    span = left = 0;
    if (++tile < in.tiles) {
      at -= block_bytes(m, V::lanes);
      return;
    }
    tile = 0, input = 0, ++block;
  }
};

// A product, span by span in four steps: codes to bytes, tiles multiplied, their sums stored, and scaled. Each step is
// a span behind the one before it, so that none waits for what another has just begun. Where a group is one span, all
// there is to a token is one vector, and 8 of them stay in registers.
template <Kind K, bool fine, bool group_is_span>
void multiply_blocks(const Product& product, const Inputs& in, const int* tokens, int count, Rooms& rooms) {
  using C = Coded<V, K>;
  const Matrix& m = *product.matrix;
  const int all = (product.end - product.begin) * in.tiles * in.spans;
  const Place<K> first{m, in, group_is_span ? 1 : m.group / kSpan, product.begin};
  Place<K> spreads = first, multiplies = first, adds = first;
  uint8_t* const bytes = rooms.codes.of(K == Kind::int4 ? size_t(in.tiles > 1 ? in.spans : 2) * kWeights : 0);
  // those of a block where other tiles read them again, else of the two spans under way
  const auto bytes_of = [&](const Place<K>& place, int odd) {
    return bytes + size_t(in.tiles > 1 ? place.span : odd) * kWeights;
  };
  alignas(64) int32_t sums[2][kRows<fine> * V::lanes];
  F<V> y[kTile], part[kTile], s = V::set(0), z = V::set(0);
  const float* shifts = in.shifts;
  const auto add = [&](const int32_t* own) __attribute__((always_inline)) {
    if (adds.span == 0) {
      unrolled<kTile>([&](auto t) { y[t] = start<V>(m, adds.block), part[t] = V::set(0); });
      if (adds.tile == 0) shifts = in.shifts;
    }
    if (adds.left == 0)
      s = group_scales<V>(m, adds.at), z = V::bytes(adds.at + zeros_at(m, V::lanes)) - V::set(C::middle);
    const float* scales = in.scales + adds.input * kTile;
    unrolled<kTile>([&](auto t) {
      const auto sum = [&](int row) { return V::whole((V::I)_mm512_load_si512(own + row * V::lanes)); };
      F<V> dots = sum(t);
      if constexpr (fine) dots = V::fma(dots, V::set(kCoarser), sum(kTile + t));
      part[t] = V::fma(dots, V::set(scales[t]), group_is_span ? V::set(0) : part[t]);
    });
    if (group_is_span || adds.ends_group()) {
      unrolled<kTile>([&](auto t) {
        y[t] = V::fma(V::fma(-z, V::set(shifts[t]), part[t]), s, y[t]);
        part[t] = V::set(0);
      });
      shifts += kTile;
    }
    if (adds.ends_tile())
      unrolled<kTile>([&](auto t) {
        const int token = adds.tile * kTile + t;
        if (token < count) put<V>(m, adds.block, y[t], product.out, tokens[token]);
      });
    adds.go_on();
  };
  const auto step = [&](auto odd, int i) __attribute__((always_inline)) {
    if (i >= 2 && i - 2 < all) store_sums<odd>(sums[odd]);
    if (i >= 1 && i - 1 < all) {
      const uint8_t* own = K == Kind::int4 ? bytes_of(multiplies, 1 - odd) : multiplies.codes();
      multiply_span<1 - odd>(in.codes + multiplies.input * (kRows<fine> * kSpan), own);
      multiplies.go_on();
    }
    if (i < all) {
      if (spreads.tile == 0) {
        for (int ahead = 0; ahead < 2 * C::bytes; ahead += 64) __builtin_prefetch(spreads.codes() + kAhead<V> + ahead);
        if constexpr (K == Kind::int4) spread(spreads.codes(), bytes_of(spreads, odd));
      }
      spreads.go_on();
    }
    if (i >= 3 && i - 3 < all) add(sums[1 - odd]);
  };
  for (int i = 0; i < all + 3; i += 2) {
    step(std::integral_constant<int, 0>(), i);
    step(std::integral_constant<int, 1>(), i + 1);
  }
}

template <bool fine>
void multiply_tiles(const Product* products, int number, const Activations& a, const int* tokens, int count) {
  Rooms& rooms = own_rooms();
  Inputs in;
  constexpr uint8_t rows = kRows<fine>;
  shape_tiles({rows, rows, kSpan / 4, kSpan / 4, rows, rows});  // sums, weights, activations
  for (int i = 0; i < number; ++i) {
    const Matrix& m = *products[i].matrix;
    if (i == 0 || m.group != products[i - 1].matrix->group) in = gather<fine>(m, a, tokens, count, rooms);
    const auto times = [&](auto kind) {
      return m.group == kSpan ? multiply_blocks<kind, fine, true>(products[i], in, tokens, count, rooms)
                              : multiply_blocks<kind, fine, false>(products[i], in, tokens, count, rooms);
    };
    m.kind == Kind::int4 ? times(std::integral_constant<Kind, Kind::int4>())
                         : times(std::integral_constant<Kind, Kind::int8>());
  }
  _tile_release();
}

void multiply_some(const Product* products, int number, const Activations& a, const int* tokens, int count) {
  const bool tiles = count >= kFewest && std::all_of(products, products + number, [](const Product& product) {
    const Matrix& m = *product.matrix;
    return (m.kind == Kind::int4 || m.kind == Kind::int8) && whole_spans(m);
  });
  if (!tiles) return multiply<V>(products, number, a, tokens, count);
  return a.fine ? multiply_tiles<true>(products, number, a, tokens, count)
                : multiply_tiles<false>(products, number, a, tokens, count);
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
