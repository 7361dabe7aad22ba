// Prompts by vectors, written once over a V as `kernels_body.h` is, and included after it: products of 4-bit codes by pairs
// of 16 bits, for which a block of rows is unpacked once for all tokens; attention, as of a few tokens, for any number.
#include <algorithm>

namespace gateskip {
namespace {

struct PromptRooms {
  Room<int16_t> codes, weights;
  Room<float> scales, parts;
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

// By tile, span and token, codes in the order of `wide`; by token, scales.
template <class V>
void gather_rows(const Activations& a, int columns, const int* tokens, int count) {
  PromptRooms& rooms = prompt_rooms();
  const F<V> most = V::set(kMostFine);
  int16_t* codes = rooms.codes.of(size_t(padded(count, kAtOnce<V>)) * columns);
  float* scales = rooms.scales.of(count);
  for (int first = 0, tile; first < count; first += tile) {
    tile = tile_of<V>(count - first);
    for (int i = 0; i < std::min(tile, count - first); ++i) {
      const float* from = a.floats(tokens[first + i]);
      const float top = largest<V>(from, columns);
      scales[first + i] = top / kMostFine + top * 0;
      const F<V> back = V::set(top > 0 ? kMostFine / top : 0);
      int16_t* to = codes + size_t(first) * columns + i * kSpan;
      for (int column = 0; column < columns; column += kSpan, to += tile * kSpan)
        for (int at = 0; at < kSpan; at += V::lanes)
          V::put_crossed(to + at, rounded<V>(V::load(from + column + at) * back, most));
    }
  }
}

// A block's codes less their zero points, two of 16 bits for each row in a vector.
template <class V>
void spread_pairs(const Matrix& m, int block, int16_t* to) {
  using I = typename V::I;
  const uint8_t* at = m.data + block * block_bytes(m, V::lanes);
  for (int column = 0; column < m.columns;) {
    const I zero = __builtin_convertvector(V::bytes(at + zeros_at(m, V::lanes)), I) * 0x10001;
    at += codes_at(m, V::lanes);
    for (const int end = std::min(column + m.group, m.columns); column < end; column += 8, at += 4 * V::lanes)
      unrolled<4>([&](auto i) {
        V::put_whole(to, V::less(V::template pairs4<i>(at), zero));
        to += 2 * V::lanes;
      });
  }
}

// A block of rows times T tokens, of which the first `own` are wanted.
template <class V, int T>
void multiply_tile(const Matrix& m, int block, const int16_t* weights, const int16_t* rows, const float* scales,
                   const int* tokens, int own, const Outputs& out) {
  using I = typename V::I;
  for (int t = 0; t < own; ++t) __builtin_prefetch(out.at + tokens[t] * out.stride + block * V::lanes, 1);
  const uint8_t* packed = m.data + block * block_bytes(m, V::lanes);
  F<V> y[T];
  unrolled<T>([&](auto t) { y[t] = V::set(0); });
  for (int column = 0; column < m.columns;) {
    const F<V> s = group_scales<V>(m, packed);
    const int end = std::min(column + m.group, m.columns);
    packed += codes_at(m, V::lanes) + (end - column) / 2 * V::lanes;
    for (; column < end; column += kSpan, rows += (T - 1) * kSpan) {
      I sum[T];
      unrolled<T>([&](auto t) { sum[t] = I{}; });
      for (int pair = 0; pair < kSpan / 2; ++pair, weights += 2 * V::lanes, rows += 2) {
        const I w = V::whole_at(weights);
        unrolled<T>([&](auto t) { sum[t] = V::add_pairs(sum[t], w, rows + t * kSpan); });
      }
      unrolled<T>([&](auto t) { y[t] = V::fma(V::whole(sum[t]), s, y[t]); });
    }
  }
  const F<V> bias = start<V>(m, block);
  unrolled<T>([&](auto t) {
    if (t < own) put<V>(m, block, V::fma(y[t], V::set(scales[t]), bias), out, tokens[t]);
  });
}

template <class V>
void multiply_gathered(const Product& product, const Activations&, const int* tokens, int count) {
  constexpr int step = kAtOnce<V> / 3;
  if (count == 0) return;
  const Matrix& m = *product.matrix;
  PromptRooms& rooms = prompt_rooms();
  int16_t* weights = rooms.weights.of(size_t(m.columns) * V::lanes);
  const size_t bytes = block_bytes(m, V::lanes);
  for (int block = product.begin; block < product.end; ++block) {
    spread_pairs<V>(m, block, weights);
    const uint8_t *next = m.data + (block + 1) * bytes, *fetched = next;  // while tokens pass
    for (int first = 0, tile; first < count; first += tile) {
      tile = tile_of<V>(count - first);
      if (block + 1 < product.end)
        for (const uint8_t* until = next + bytes * std::min(first + tile, count) / count; fetched < until; fetched += 64)
          __builtin_prefetch(fetched);
      const auto times = [&](auto T) {
        multiply_tile<V, T>(m, block, weights, rooms.codes.of(0) + size_t(first) * m.columns, rooms.scales.of(0) + first,
                            tokens + first, std::min(tile, count - first), product.out);
      };
      switch (tile / step) {
        case 1: times(std::integral_constant<int, step>()); break;
        case 2: times(std::integral_constant<int, 2 * step>()); break;
        case 3: times(std::integral_constant<int, 3 * step>()); break;
      }
    }
  }
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

template <class V>
constexpr PromptKernels prompts_by = {nullptr, gather_rows<V>, multiply_gathered<V>, attend_prompt<V>};

}  // namespace
}  // namespace gateskip
