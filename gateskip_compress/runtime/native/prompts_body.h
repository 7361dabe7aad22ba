// Prompts by vectors, written once over a V as `kernels_body.h` is, and included after it: products of 4-bit codes, of
// which a block of rows is unpacked once for all tokens; attention, as of a few tokens, for any number.
#include <algorithm>

namespace gateskip {
namespace {

struct PromptRooms {
  Room<int8_t> codes;
  Room<uint8_t> weights;
  Room<float> scales, parts;
  Room<int32_t> shifts;
};

PromptRooms& prompt_rooms() {
  thread_local PromptRooms rooms;
  return rooms;
}

// Tokens that are multiplied at once: their sums of a span and of all, a weight and an input fit the registers.
template <class V>
constexpr int kAtOnce = V::lanes > 8 ? 12 : 6;

// Those of the next tile, of so many that are left; some stand for none.
template <class V>
int tile_of(int left) {
  return std::min(kAtOnce<V>, padded(left, kAtOnce<V> / 3));
}

// How codes w are multiplied by activations a: `pairs` of 16 bits; `fours` of 8, where processors add these to sums
// directly; or, where they add beside multiplying, by half of the multiplications (Winograd, "A New Algorithm for Inner
// Product", IEEE Transactions on Computers, 1968), with pairs of `sums` in (w0 + a1) (w1 + a0) = w0 a0 + w1 a1 + w0 w1 +
// a0 a1. Over a span, what these give where all a are 0 and where all w are is taken off, and what they give where both
// are is added again; they may wrap around, as what is left fits.
enum class Way { fours, pairs, sums };

// Weights less their zero points, -15 to 15, are moved up by kMiddle, as the multiplications of `fours` want no sign; of
// `sums` activations are too, as one addition of 32 bits is to be two of 16, and a bit less of them fits.
constexpr int kMiddle = 15, kMostSummed = (0x7fff - 2 * kMiddle) / 2;

template <Way way>
constexpr int kMostOf = way == Way::fours ? kMost : way == Way::pairs ? kMostFine : kMostSummed;

// Of activations; for each row of weights, those and what `sums` give where all activations are 0, negative.
template <Way way>
constexpr int kSpanBytes = way == Way::fours ? kSpan : 2 * kSpan;
template <Way way>
constexpr int kSpanWeights = kSpanBytes<way> + (way == Way::sums ? 4 : 0);

// By tile, span and token: codes, of 16 bits in the order of `wide`; but for `pairs`, shifts that make up for what is
// moved up. `fours` have scales in the same order; others have one for each token.
template <class V, Way way>
void round_rows(const Activations& a, int columns, const int* tokens, int count) {
  using I = typename V::I;
  constexpr bool own_scales = way == Way::fours;  // of spans
  PromptRooms& rooms = prompt_rooms();
  const int all = padded(count, kAtOnce<V>), spans = columns / kSpan;
  const F<V> most = V::set(kMostOf<way>);
  int8_t* codes = rooms.codes.of(size_t(all) * spans * kSpanBytes<way>);
  float* scales = rooms.scales.of(size_t(all) * (own_scales ? spans : 1));
  int32_t* shifts = rooms.shifts.of(way == Way::pairs ? 0 : size_t(all) * spans);
  for (int first = 0, tile; first < count; first += tile) {
    tile = tile_of<V>(count - first);
    for (int i = 0; i < std::min(tile, count - first); ++i) {
      const float* from = a.floats(tokens[first + i]);
      float top = own_scales ? 0 : largest<V>(from, columns);
      if (!own_scales) scales[first + i] = top / most[0] + top * 0;
      for (int span = 0; span < spans; ++span, from += kSpan) {
        const size_t place = size_t(first) * spans + span * tile + i;
        if (own_scales) top = largest<V>(from, kSpan), scales[place] = top / most[0] + top * 0;
        const F<V> back = V::set(top > 0 ? most[0] / top : 0);
        int8_t* to = codes + place * kSpanBytes<way>;
        I sums = {};
        for (int at = 0; at < kSpan; at += V::lanes) {
          I code = rounded<V>(V::load(from + at) * back, most);
          if constexpr (way == Way::fours) {
            V::put_bytes(to + at, code), sums += code;
          } else {
            if constexpr (way == Way::sums) code += kMostSummed, sums += V::neighbours(code + kMiddle);
            V::put_crossed(reinterpret_cast<int16_t*>(to) + at, code);
          }
        }
        if constexpr (way == Way::fours) shifts[place] = -kMiddle * V::sum(sums);
        if constexpr (way == Way::sums) {
          constexpr uint32_t neither = kMiddle + kMostSummed;  // a weight and an activation that stand for 0
          shifts[place] = static_cast<int32_t>(kSpan / 2 * neither * neither - static_cast<uint32_t>(V::sum(sums)));
        }
      }
    }
  }
}

template <class V, Way way>
void gather_rows(const Activations& a, int columns, const int* tokens, int count) {
  if constexpr (V::direct)
    if (!a.fine) return round_rows<V, Way::fours>(a, columns, tokens, count);
  round_rows<V, way>(a, columns, tokens, count);
}

// A block's codes less their zero points, in vectors of two columns of each row, or of four.
template <class V, Way way>
void unpack_block(const Matrix& m, int block, uint8_t* to) {
  using I = typename V::I;
  constexpr int in_all = way == Way::fours ? 0x1010101 : 0x10001;  // of what a lane's 32 bits hold
  const I up = I{} + (way == Way::pairs ? 0 : kMiddle) * in_all, none = I{} + kMostSummed * 0x10001;
  const uint8_t* at = m.data + block * block_bytes(m, V::lanes);
  for (int column = 0; column < m.columns;) {
    const I zeros = __builtin_convertvector(V::bytes(at + zeros_at(m, V::lanes)), I) * in_all;
    at += codes_at(m, V::lanes);
    for (const int group = std::min(column + m.group, m.columns); column < group;) {
      I alone = {};
      for (const int span = column + kSpan; column < span; column += 8, at += 4 * V::lanes) {
        constexpr int vectors = way == Way::fours ? 2 : 4;
        I own[vectors];
        unrolled<vectors>([&](auto i) {
          if constexpr (way == Way::fours)
            own[i] = (I)(i ? V::high(V::codes(at)) : V::low(V::codes(at))) + up - zeros;
          else
            own[i] = V::less(V::template pairs4<i>(at) + up, zeros);
          V::put_whole(to + 4 * V::lanes * i, own[i]);
        });
        to += 4 * V::lanes * vectors;
        if constexpr (way == Way::sums)
          for (int i = 0; i < vectors; i += 2)
            alone = V::add_products(alone, own[i] + none, own[i + 1] + none);
      }
      if constexpr (way == Way::sums) V::put_whole(to, -alone), to += 4 * V::lanes;
    }
  }
}

// Codes, scales and shifts of tokens that are multiplied at once, the first `count` of which are wanted.
struct Tile {
  const int8_t* rows;
  const float* scales;
  const int32_t* shifts;
  const int* tokens;
  int count;
};

// A span of a block of rows times T tokens: whole numbers.
template <class V, Way way, int T>
inline __attribute__((always_inline)) void span_dots(const uint8_t* weights, const int8_t* rows, const int32_t* shifts,
                                                     typename V::I (&sum)[T]) {
  using I = typename V::I;
  constexpr int bytes = kSpanBytes<way>;
  const auto pair = [&](int t, int at) { return reinterpret_cast<const int16_t*>(rows + t * bytes + at); };
  if constexpr (way == Way::sums) {
    const I alone = V::whole_at(weights + bytes * V::lanes);
    unrolled<T>([&](auto t) { sum[t] = V::plus(alone, shifts + t); });
    for (int at = 0; at < bytes; at += 8, weights += 8 * V::lanes) {
      const I w = V::whole_at(weights), next = V::whole_at(weights + 4 * V::lanes);
      unrolled<T>([&](auto t) {
        sum[t] = V::add_products(sum[t], V::plus(w, pair(t, at + 4)), V::plus(next, pair(t, at)));
      });
    }
  } else {
    unrolled<T>([&](auto t) { sum[t] = way == Way::pairs ? I{} : I{} + shifts[t]; });
    for (int at = 0; at < bytes; at += 4, weights += 4 * V::lanes) {
      const I w = V::whole_at(weights);
      unrolled<T>([&](auto t) {
        if constexpr (way == Way::pairs)
          sum[t] = V::add_pairs(sum[t], w, pair(t, at));
        else
          sum[t] = V::add_dots(sum[t], (typename V::Codes)w, rows + t * bytes + at);
      });
    }
  }
}

// A block of rows times T tokens.
template <class V, Way way, int T>
void multiply_tile(const Matrix& m, int block, const uint8_t* weights, const Tile& tile, const Outputs& out) {
  constexpr bool own_scales = way == Way::fours;  // of spans
  const int8_t* rows = tile.rows;
  const float* scales = tile.scales;
  const int32_t* shifts = tile.shifts;
  for (int t = 0; t < tile.count; ++t)
    __builtin_prefetch(out.at + tile.tokens[t] * out.stride + block * V::lanes, 1);
  const uint8_t* packed = m.data + block * block_bytes(m, V::lanes);
  F<V> y[T];
  unrolled<T>([&](auto t) { y[t] = V::set(0); });
  for (int column = 0; column < m.columns;) {
    const F<V> s = group_scales<V>(m, packed);
    const int end = std::min(column + m.group, m.columns);
    packed += codes_at(m, V::lanes) + (end - column) / 2 * V::lanes;
    for (; column < end; column += kSpan) {
      typename V::I sum[T];
      span_dots<V, way, T>(weights, rows, shifts, sum);
      unrolled<T>([&](auto t) {
        const F<V> whole = V::whole(sum[t]);
        y[t] = V::fma(own_scales ? whole * V::set(scales[t]) : whole, s, y[t]);
      });
      weights += kSpanWeights<way> * V::lanes, rows += T * kSpanBytes<way>;
      if (own_scales) scales += T;
      if (way != Way::pairs) shifts += T;
    }
  }
  const F<V> bias = start<V>(m, block);
  unrolled<T>([&](auto t) {
    if (t < tile.count)
      put<V>(m, block, own_scales ? y[t] + bias : V::fma(y[t], V::set(scales[t]), bias), out, tile.tokens[t]);
  });
}

template <class V, Way way>
void multiply_rows(const Product& product, const int* tokens, int count) {
  constexpr int step = kAtOnce<V> / 3;
  if (count == 0) return;
  const Matrix& m = *product.matrix;
  PromptRooms& rooms = prompt_rooms();
  const int spans = m.columns / kSpan;
  uint8_t* weights = rooms.weights.of(size_t(spans) * kSpanWeights<way> * V::lanes);
  const size_t bytes = block_bytes(m, V::lanes);
  for (int block = product.begin; block < product.end; ++block) {
    unpack_block<V, way>(m, block, weights);
    const uint8_t *next = m.data + (block + 1) * bytes, *fetched = next;  // while tokens pass
    for (int first = 0, size; first < count; first += size) {
      size = tile_of<V>(count - first);
      if (block + 1 < product.end)
        for (; fetched < next + bytes * std::min(first + size, count) / count; fetched += 64) __builtin_prefetch(fetched);
      const size_t place = size_t(first) * spans;
      const Tile tile = {rooms.codes.of(0) + place * kSpanBytes<way>,
                         rooms.scales.of(0) + (way == Way::fours ? place : first),
                         rooms.shifts.of(0) + (way == Way::pairs ? 0 : place), tokens + first,
                         std::min(size, count - first)};
      const auto times = [&](auto T) { multiply_tile<V, way, T>(m, block, weights, tile, product.out); };
      switch (size / step) {
        case 1: times(std::integral_constant<int, step>()); break;
        case 2: times(std::integral_constant<int, 2 * step>()); break;
        case 3: times(std::integral_constant<int, 3 * step>()); break;
      }
    }
  }
}

template <class V, Way way>
void multiply_gathered(const Product& product, const Activations& a, const int* tokens, int count) {
  if constexpr (V::direct)
    if (!a.fine) return multiply_rows<V, Way::fours>(product, tokens, count);
  multiply_rows<V, way>(product, tokens, count);
}

template <class V, class E>
void attend_queries(const PromptQueries& to, Element element) {
  const int d = to.head_dim;
  Queries now;
  now.head_dim = d;
  for (int first = 0; first < to.count; first += kMostQueries) {
    const int count = std::min(kMostQueries, to.count - first);
    const PromptQuery* queries = to.queries + first;
    int first_run = queries[0].begin / kRun, end_run = 0;
    for (int i = 0; i < count; ++i)
      first_run = std::min(first_run, queries[i].begin / kRun), end_run = std::max(end_run, runs_of(queries[i].end));
    const size_t size = Queries::part_size(d), apart = size * (end_run - first_run);
    float* parts = prompt_rooms().parts.of(kMostQueries * apart);
    for (int run = first_run; run < end_run; ++run) {
      const size_t from = size_t(run) * kRun;
      now.keys = static_cast<const E*>(to.keys) + from * d, now.values = static_cast<const E*>(to.values) + from * d;
      if constexpr (scaled<E>)
        now.key_scales = to.key_scales + from * key_groups(d), now.value_scales = to.value_scales + from;
      now.count = 0;
      for (int i = 0; i < count; ++i) {
        const int begin = std::max(queries[i].begin - run * kRun, 0), end = std::min(queries[i].end - run * kRun, kRun);
        if (begin >= end) continue;
        now.query[now.count] = queries[i].x, now.part[now.count] = parts + i * apart + (run - first_run) * size;
        now.begin[now.count] = begin, now.end[now.count++] = end;
      }
      if (now.count) attend<V>(now, element);
    }
    for (int i = 0; i < count; ++i) {
      const int own = queries[i].begin / kRun;
      merge<V>(parts + i * apart + (own - first_run) * size, runs_of(queries[i].end) - own, d, queries[i].out);
    }
  }
}

template <class V>
void attend_prompt(const PromptQueries& to, Element element) {
  switch (element) {
    case Element::f32: return attend_queries<V, float>(to, element);
    case Element::f16: return attend_queries<V, uint16_t>(to, element);
    case Element::int8: return attend_queries<V, int8_t>(to, element);
  }
}

// Those whose activations of 16 bits go such a way.
template <class V, Way way>
constexpr PromptKernels prompts_by = {nullptr, gather_rows<V, way>, multiply_gathered<V, way>, attend_prompt<V>,
                                      V::direct};

}  // namespace
}  // namespace gateskip
