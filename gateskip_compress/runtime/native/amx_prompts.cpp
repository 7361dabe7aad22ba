// Prompts by AMX's tiles: 16 tokens or queries and 16 rows at a time. Attention, and products of bf16, by bfloat16: what
// is multiplied is a sum of two, which is as good as 16 bits; weights are one. Products of 4-bit codes by whole numbers.
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
#pragma clang attribute push(                                                                                \
    __attribute__((                                                                                          \
        target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16,prfchw"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16,prfchw")
#endif
#include "kernels_body.h"
#include "tiles.h"
#include "vector512.h"

namespace gateskip {
namespace {

using V = Avx512;

constexpr int kTile = 16;     // tokens, queries, rows or positions
constexpr int kBytes = 1024;  // of a tile
constexpr int kSums = kTile * V::lanes;

static_assert(kChunk == 32 && kKeyGroup == 32 && V::lanes == kTile);

struct Rooms {
  Room<uint16_t> rows, shares;
  Room<uint8_t> weights, keys, values;
  Room<float> states, scales;
  Room<int8_t> codes;
};

Rooms& own_rooms() {
  thread_local Rooms rooms;
  return rooms;
}

// Registers 0 and 1 hold sums, 4 and 5 what is multiplied, high and low, 6 and 7 with what.
constexpr uint8_t kRegisters[8] = {kTile, kTile, 0, 0, kTile, kTile, kTile, kTile};

// ---- two of bfloat16

// The nearest bfloat16, as a float; of two as near, the larger one.
inline F<V> nearest(F<V> x) { return (F<V>)(((V::I)x + 0x8000) & int(0xffff0000)); }

struct Order {
  alignas(64) uint16_t at[32] = {};
};

constexpr Order kUpper = [] {
  Order order;
  for (int i = 0; i < 32; ++i) order.at[i] = static_cast<uint16_t>(2 * i + 1);
  return order;
}();

// Floats that are bfloat16, a's before b's.
inline __m512i joined(F<V> a, F<V> b) {
  return _mm512_permutex2var_epi16((__m512i)a, _mm512_load_si512(kUpper.at), (__m512i)b);
}

// The same, as a tile's row: a0 b0 a1 b1 ...
inline __m512i zipped(F<V> a, F<V> b) { return _mm512_or_si512(_mm512_srli_epi32((__m512i)a, 16), (__m512i)b); }

// 32 floats to two of bfloat16.
inline void split_two(F<V> a, F<V> b, uint16_t* high, uint16_t* low) {
  const F<V> first = nearest(a), second = nearest(b);
  _mm512_storeu_si512(high, joined(first, second));
  _mm512_storeu_si512(low, joined(nearest(a - first), nearest(b - second)));
}

// Floats, filled up with zeros to whole 32.
inline void split_row(const float* from, int count, uint16_t* high, uint16_t* low) {
  for (int i = 0; i < count; i += 32)
    split_two(V::load(from + i), i + V::lanes < count ? V::load(from + i + V::lanes) : V::set(0), high + i, low + i);
}

void split(const Activations& a, int token, int begin, int end) {
  float* from = a.floats(token);
  for (int column = end; column < padded(end, kChunk); ++column) from[column] = 0;
  uint16_t* to = a.halves + size_t(token) * a.halves_apart() + begin;
  split_row(from + begin, padded(end, kChunk) - begin, to, to + a.columns);
}

// ---- products

// Rows times two of tiles, `steps` of each: 16 sums a row of each. Low halves of rows lie `low_at` after the high ones,
// those of tiles after each tile.
template <bool low_rows, bool low_tiles>
inline void multiply_two(const uint16_t* rows, size_t low_at, size_t apart, const uint8_t* first,
                         const uint8_t* second, int steps, float* to_first, float* to_second, size_t stride) {
  constexpr size_t step_bytes = (low_tiles ? 2 : 1) * kBytes;
  _tile_zero(0);
  _tile_zero(1);
  for (int step = 0; step < steps; ++step, rows += 32, first += step_bytes, second += step_bytes) {
    _tile_loadd(4, rows, 2 * apart);
    _tile_loadd(6, first, 64);
    _tile_loadd(7, second, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (low_rows) {
      _tile_loadd(5, rows + low_at, 2 * apart);
      _tile_dpbf16ps(0, 5, 6);
      _tile_dpbf16ps(1, 5, 7);
    }
    if constexpr (low_tiles) {
      _tile_loadd(6, first + kBytes, 64);
      _tile_loadd(7, second + kBytes, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  _tile_stored(0, to_first, 4 * stride);
  _tile_stored(1, to_second, 4 * stride);
}

// A block of rows as tiles, one for each 32 columns: of each pair of them two of every row.
void tiles_of(const Matrix& m, int block, uint8_t* to) {
  const uint16_t* at = reinterpret_cast<const uint16_t*>(m.data + block * block_bytes(m, V::lanes));
  const auto column = [&](int i) { return i < m.columns ? V::bf16(at + i * V::lanes) : V::set(0); };
  for (int i = 0; i < padded(m.columns, kChunk); i += 2, to += 4 * V::lanes)
    _mm512_store_si512(to, zipped(column(i), column(i + 1)));
  written();
}

// The tokens' rows one after the other, filled up to whole tiles: where they lie, or a copy.
const uint16_t* rows_of(const Activations& a, const int* tokens, int count, Rooms& rooms) {
  const size_t apart = a.halves_apart();
  bool as_they_lie = count % kTile == 0;
  for (int i = 1; i < count && as_they_lie; ++i) as_they_lie = tokens[i] == tokens[0] + i;
  if (as_they_lie) return a.halves + tokens[0] * apart;
  uint16_t* to = rooms.rows.of(padded(count, kTile) * apart);
  for (int i = 0; i < padded(count, kTile); ++i)
    std::memcpy(to + i * apart, a.halves + tokens[std::min(i, count - 1)] * apart, sizeof(uint16_t) * apart);
  written();
  return to;
}

template <bool low>
void multiply_tiles(const Product& product, const Activations& a, const int* tokens, int count) {
  const Matrix& m = *product.matrix;
  Rooms& rooms = own_rooms();
  const int chunks = padded(m.columns, kChunk) / kChunk;
  const size_t size = size_t(chunks) * kBytes, apart = a.halves_apart();
  const uint16_t* rows = rows_of(a, tokens, count, rooms);
  uint8_t* weights = rooms.weights.of(2 * size);
  alignas(64) float sums[2][kSums];
  shape_tiles(kRegisters);
  for (int first = product.begin; first < product.end; first += 2) {
    const int blocks = std::min(2, product.end - first);
    for (int i = 0; i < blocks; ++i) tiles_of(m, first + i, weights + i * size);
    for (int from = 0; from < count; from += kTile) {
      multiply_two<low, false>(rows + from * apart, a.columns, apart, weights, weights + (blocks - 1) * size, chunks,
                               sums[0], sums[1], V::lanes);
      for (int t = 0; t < kTile && from + t < count; ++t)
        for (int i = 0; i < blocks; ++i)
          put<V>(m, first + i, start<V>(m, first + i) + V::load(sums[i] + t * V::lanes), product.out, tokens[from + t]);
    }
  }
  _tile_release();
}

// ---- products of codes

constexpr int kTwoBytes = 2 * kBytes;  // of a tile of activations, `q` and `fine`

// By 16 tokens and span, a tile of `q`, and one of `fine`; by token, scales.
void gather(const Activations& a, int columns, const int* tokens, int count) {
  Rooms& rooms = own_rooms();
  const int spans = columns / kSpan, all = padded(count, kTile);
  int8_t* codes = rooms.codes.of(size_t(all) * spans * kTwoBytes / kTile);
  float* scales = rooms.scales.of(all);
  for (int i = 0; i < count; ++i) {
    const float* from = a.floats(tokens[i]);
    const float top = largest<V>(from, columns);
    scales[i] = top / kMostFine + top * 0;
    const F<V> back = V::set(top > 0 ? kMostFine / top : 0), most = V::set(kMostFine);
    int8_t* to = codes + size_t(i / kTile) * spans * kTwoBytes + i % kTile * kSpan;
    for (int span = 0; span < spans; ++span, from += kSpan, to += kTwoBytes)
      for (int at = 0; at < kSpan; at += V::lanes)
        put_code<V>(rounded<V>(V::load(from + at) * back, most), to + at, to + kBytes + at);
  }
  written();
}

// A block's codes less their zero points, from -15 to 15, as tiles of a span.
void spread(const Matrix& m, int block, uint8_t* to) {
  using C = Coded<V, Kind::int4>;
  const uint8_t* at = m.data + block * block_bytes(m, V::lanes);
  for (int column = 0; column < m.columns;) {
    const __m128i zeros = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + zeros_at(m, V::lanes)));
    const __m512i zero = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(zeros), _mm512_set1_epi32(0x01010101));
    at += codes_at(m, V::lanes);
    for (const int end = std::min(column + m.group, m.columns); column < end; column += kChunk, at += C::bytes) {
      typename V::Codes codes[8];
      load_chunk<C>(at, codes);
      for (int i = 0; i < 8; ++i, to += 4 * V::lanes) _mm512_store_si512(to, _mm512_sub_epi8(codes[i], zero));
    }
  }
  written();
}

// A group's codes, `spans` tiles, times those of 16 tokens: sums of `q`, then of `fine`.
inline __attribute__((always_inline)) void multiply_group(const int8_t* rows, const uint8_t* codes, int spans,
                                                          int32_t (&sums)[2][kSums]) {
  _tile_zero(0);
  _tile_zero(1);
  for (int span = 0; span < spans; ++span, rows += kTwoBytes, codes += kBytes) {
    _tile_loadd(6, codes, 64);
    _tile_loadd(4, rows, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, rows + kBytes, 64);
    _tile_dpbssd(1, 5, 6);
  }
  _tile_stored(0, sums[0], 4 * V::lanes);
  _tile_stored(1, sums[1], 4 * V::lanes);
}

// A block of rows times 16 tokens or fewer. Tiles are a group ahead of what their sums are scaled with.
void multiply_block(const Matrix& m, int block, const int8_t* rows, const float* scales, const uint8_t* codes,
                    const int* tokens, int count, const Outputs& out) {
  const int spans = m.columns / kSpan, per_group = m.group / kSpan, all = groups(m);
  const size_t group_bytes = codes_at(m, V::lanes) + per_group * 2 * Coded<V, Kind::int4>::bytes;
  const uint8_t* packed = m.data + block * block_bytes(m, V::lanes);
  alignas(64) int32_t sums[2][2][kSums];
  const auto multiply_ahead = [&](int group) {
    const int span = group * per_group;
    multiply_group(rows + size_t(span) * kTwoBytes, codes + size_t(span) * kBytes, std::min(per_group, spans - span),
                   sums[group % 2]);
  };
  F<V> y[kTile];
  unrolled<kTile>([&](auto t) { y[t] = V::set(0); });
  multiply_ahead(0);
  for (int group = 0; group < all; ++group, packed += group_bytes) {
    if (group + 1 < all) multiply_ahead(group + 1);
    for (int t = kTile * group / all; t < std::min(count, kTile * (group + 1) / all); ++t)
      __builtin_prefetch(out.at + tokens[t] * out.stride + block * V::lanes, 1);
    const F<V> s = group_scales<V>(m, packed);
    const auto& own = sums[group % 2];
    unrolled<kTile>([&](auto t) {
      const auto sum = [&](int of) { return V::whole((V::I)_mm512_load_si512(own[of] + t * V::lanes)); };
      y[t] = V::fma(V::fma(sum(0), V::set(kCoarser), sum(1)), s, y[t]);
    });
  }
  const F<V> bias = start<V>(m, block);
  unrolled<kTile>([&](auto t) {
    if (t < count) put<V>(m, block, V::fma(y[t], V::set(scales[t]), bias), out, tokens[t]);
  });
}

void multiply_gathered(const Product& product, const int* tokens, int count) {
  const Matrix& m = *product.matrix;
  Rooms& rooms = own_rooms();
  const size_t size = size_t(m.columns / kSpan) * kBytes;
  const int8_t* rows = rooms.codes.of(0);
  const float* scales = rooms.scales.of(0);
  uint8_t* codes = rooms.weights.of(size);
  shape_tiles(kRegisters);
  const size_t bytes = block_bytes(m, V::lanes), step = bytes * kTile / padded(count, kTile);
  for (int block = product.begin; block < product.end; ++block) {
    spread(m, block, codes);
    const uint8_t *next = m.data + (block + 1) * bytes, *fetched = next;
    for (int from = 0; from < count; from += kTile) {
      if (block + 1 < product.end)
        for (const uint8_t* until = next + step * (from / kTile + 1); fetched < until; fetched += 64)
          __builtin_prefetch(fetched);
      multiply_block(m, block, rows + from / kTile * 2 * size, scales + from, codes, tokens + from, count - from,
                     product.out);
    }
  }
  _tile_release();
}

void multiply_prompt(const Product& product, const Activations& a, const int* tokens, int count) {
  if (count == 0 || product.begin >= product.end) return;
  if (product.matrix->kind == Kind::int4) return multiply_gathered(product, tokens, count);
  return a.fine ? multiply_tiles<true>(product, a, tokens, count) : multiply_tiles<false>(product, a, tokens, count);
}

// ---- attention

// Two neighbouring rows of 16 floats as pairs: a tile's row, and that of what it leaves, a tile further.
inline void put_pairs(F<V> a, F<V> b, uint8_t* to) {
  const F<V> first = nearest(a), second = nearest(b);
  _mm512_store_si512(to, zipped(first, second));
  _mm512_store_si512(to + kBytes, zipped(nearest(a - first), nearest(b - second)));
}

// Keys of a run's positions [0, end), filled up to whole 32: for each 16, for each 32 channels, a tile, high and low.
template <class E>
void widen_keys(const PromptQueries& of, int run, int end, uint8_t* to) {
  const int d = of.head_dim;
  const E* keys = static_cast<const E*>(of.keys) + size_t(run) * kRun * d;
  const float* scales = scaled<E> ? of.key_scales + size_t(run) * kRun * key_groups(d) : nullptr;
  for (int block = 0; block < padded(end, 32) / V::lanes; ++block) {
    const int own = block * V::lanes < end ? d : 0;
    for (int from = 0; from < d; from += kKeyGroup, to += 2 * kBytes) {
      F<V> scale = V::set(1);
      if constexpr (scaled<E>)
        if (own)
          scale = V::load(scales + (block * key_groups(d) + from / kKeyGroup) * V::lanes);
      const auto channel = [&](int i) {
        return from + i < own ? element<V>(keys + (size_t(block) * d + from + i) * V::lanes) * scale : V::set(0);
      };
      for (int i = 0; i < kKeyGroup; i += 2) put_pairs(channel(i), channel(i + 1), to + i / 2 * 4 * V::lanes);
    }
  }
  written();
}

// Values likewise: for each 16 channels, for each 32 positions of a run, a tile, high and low.
template <class E>
void widen_values(const PromptQueries& of, int run, int end, uint8_t* to) {
  const int d = of.head_dim;
  const E* values = static_cast<const E*>(of.values) + size_t(run) * kRun * d;
  const auto row = [&](int position, int channel) {
    if (position >= end) return V::set(0);
    F<V> v = element<V>(values + size_t(position) * d + channel);
    if constexpr (scaled<E>) v = v * V::set(of.value_scales[run * kRun + position]);
    return v;
  };
  for (int channel = 0; channel < d; channel += V::lanes, to += kRun / 32 * 2 * kBytes)
    for (int position = 0; position < padded(end, 32); position += 2)
      put_pairs(row(position, channel), row(position + 1, channel),
                to + position / 32 * 2 * kBytes + position % 32 / 2 * 4 * V::lanes);
  written();
}

// Scores of the positions [from, until) to weights e^(score - top), as two of bfloat16; 0 for the others in [begin, end),
// whole 32.
inline void weigh_row(const float* scores, int from, int until, int begin, int end, uint16_t* high, uint16_t* low,
                      float& top, float& sum) {
  const auto until_here = [](int last, int at) { return (1u << std::min(std::max(last - at, 0), V::lanes)) - 1; };
  const auto seen = [&](int at) { return static_cast<__mmask16>(until_here(until, at) & ~until_here(from, at)); };
  const auto whole = [&](int at) { return from <= at && at + 32 <= until; };
  F<V> most = V::set(-INFINITY), total = V::set(0);
  for (int at = begin; at < end; at += 32)
    for (int own : {at, at + V::lanes})
      most = _mm512_mask_max_ps(most, whole(at) ? __mmask16(-1) : seen(own), most, V::load(scores + own));
  top = _mm512_reduce_max_ps(most);
  for (int at = begin; at < end; at += 32) {
    F<V> a = exponential<V>(V::load(scores + at) - V::set(top)),
         b = exponential<V>(V::load(scores + at + V::lanes) - V::set(top));
    if (!whole(at)) a = _mm512_maskz_mov_ps(seen(at), a), b = _mm512_maskz_mov_ps(seen(at + V::lanes), b);
    total = total + a + b;
    split_two(a, b, high + at, low + at);
  }
  sum = _mm512_reduce_add_ps(total);
}

// 16 queries that wait for what they have not seen yet: the parts that they got so far, as of `Queries`.
struct Waiting {
  float *values, *top, *sum;  // (16, head_dim), (16), (16)
};

// What a run of positions gives to queries, their split rows at hand.
void attend_run(const PromptQueries& to, int first, int count, int run, const uint16_t* rows, const uint8_t* keys,
                const uint8_t* values, const Waiting& now, Rooms& rooms) {
  constexpr int stride = kRun + V::lanes;  // further apart than the cache's sets repeat
  constexpr size_t apart = 2 * kRun + 32;
  const int d = to.head_dim, depth = padded(d, 32), base = run * kRun;
  const auto within = [&](int position) { return std::min(std::max(position - base, 0), kRun); };
  int begin = kRun, end = 0;
  for (int i = 0; i < count; ++i) {
    const PromptQuery& query = to.queries[first + i];
    if (within(query.begin) >= within(query.end)) continue;
    begin = std::min(begin, within(query.begin)), end = std::max(end, within(query.end));
  }
  if (begin >= end) return;
  begin = begin / 32 * 32, end = padded(end, 32);
  alignas(64) float scores[kTile * stride], mixed[2][kSums];
  for (int p = begin; p < end; p += 32) {
    const uint8_t* own = keys + size_t(p / V::lanes) * (depth / 32) * 2 * kBytes;
    multiply_two<true, true>(rows, depth, 2 * depth, own, own + size_t(depth / 32) * 2 * kBytes, depth / 32, scores + p,
                             scores + p + V::lanes, stride);
  }
  uint16_t* shares = rooms.shares.of(kTile * apart);
  float kept[kTile], added[kTile];
  for (int i = 0; i < kTile; ++i) {
    uint16_t *high = shares + i * apart, *low = high + kRun;
    const int from = i < count ? within(to.queries[first + i].begin) : 0,
              until = i < count ? within(to.queries[first + i].end) : 0;
    kept[i] = 1, added[i] = 0;
    if (from < until) {
      float top, sum;
      weigh_row(scores + i * stride, from, until, begin, end, high, low, top, sum);
      const float most = std::max(now.top[i], top);
      kept[i] = std::exp(now.top[i] - most), added[i] = std::exp(top - most);
      now.top[i] = most, now.sum[i] = now.sum[i] * kept[i] + sum * added[i];
    } else {
      for (uint16_t* half : {high, low}) std::fill(half + begin, half + end, uint16_t(0));
    }
  }
  written();
  for (int channel = 0; channel < d; channel += 2 * V::lanes) {
    const bool two = channel + V::lanes < d;
    const uint8_t* own = values + (size_t(channel / V::lanes) * (kRun / 32) + begin / 32) * 2 * kBytes;
    multiply_two<true, true>(shares + begin, kRun, apart, own, two ? own + kRun / 32 * 2 * kBytes : own, (end - begin) / 32,
                             mixed[0], mixed[1], V::lanes);
    for (int i = 0; i < count; ++i)
      for (int part = 0; part <= two; ++part) {
        float* at = now.values + i * d + channel + part * V::lanes;
        V::store(at, V::fma(V::load(mixed[part] + i * V::lanes), V::set(added[i]), V::load(at) * V::set(kept[i])));
      }
  }
}

template <class E>
void attend_all(const PromptQueries& to) {
  Rooms& rooms = own_rooms();
  const int d = to.head_dim, depth = padded(d, 32), all = padded(to.count, kTile);
  uint16_t* rows = rooms.rows.of(size_t(all) * 2 * depth);
  float* states = rooms.states.of(size_t(all) * (d + 2));
  const Waiting waiting{states, states + size_t(all) * d, states + size_t(all) * (d + 1)};
  int begin = to.queries[0].begin, end = 0;
  for (int i = 0; i < to.count; ++i) {
    begin = std::min(begin, to.queries[i].begin), end = std::max(end, to.queries[i].end);
    split_row(to.queries[i].x, d, rows + size_t(i) * 2 * depth, rows + size_t(i) * 2 * depth + depth);
  }
  std::memset(rows + size_t(to.count) * 2 * depth, 0, sizeof(uint16_t) * (all - to.count) * 2 * depth);
  std::fill_n(waiting.values, size_t(all) * d, 0.0f);
  std::fill_n(waiting.top, all, -INFINITY);
  std::fill_n(waiting.sum, all, 0.0f);
  uint8_t* keys = rooms.keys.of(size_t(kRun) * depth * 4);
  uint8_t* values = rooms.values.of(size_t(kRun) * d * 4);
  shape_tiles(kRegisters);
  for (int run = begin / kRun; run < runs_of(end); ++run) {
    const int seen = std::min(kRun, end - run * kRun);
    widen_keys<E>(to, run, seen, keys);
    widen_values<E>(to, run, seen, values);
    for (int first = 0; first < to.count; first += kTile)
      attend_run(to, first, std::min(kTile, to.count - first), run, rows + size_t(first) * 2 * depth, keys, values,
                 {waiting.values + size_t(first) * d, waiting.top + first, waiting.sum + first}, rooms);
  }
  _tile_release();
  for (int i = 0; i < to.count; ++i)
    for (int channel = 0; channel < d; channel += V::lanes)
      V::store(to.queries[i].out + channel, V::load(waiting.values + size_t(i) * d + channel) / V::set(waiting.sum[i]));
}

void attend_prompt(const PromptQueries& to, Element element) {
  if (to.count == 0) return;
  switch (element) {
    case Element::f32: return attend_all<float>(to);
    case Element::f16: return attend_all<uint16_t>(to);
    case Element::int8: return attend_all<int8_t>(to);
  }
}

}  // namespace

const PromptKernels amx_prompts = {split, gather, multiply_prompt, attend_prompt};

}  // namespace gateskip

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
