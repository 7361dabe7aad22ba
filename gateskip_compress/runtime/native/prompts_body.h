// Prompts by vectors, written once over a V as `kernels_body.h` is, and included after it: products of 4-bit codes, of
// which a block of rows is unpacked once for all tokens, by pairs of 16 bits, or by fours of 8 where processors add these
// to sums directly; attention, as of a few tokens, for any number.
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

constexpr int kMiddle = 15;  // codes of 8 bits are of 0 to 30 and stand for this much less, as processors want no sign

template <bool fine>
constexpr int kSpanBytes = fine ? 2 * kSpan : kSpan;

// By tile, span and token: codes, of 16 bits in the order of `wide`; with those of 8 bits a scale each, and what makes up
// for kMiddle. Of 16 bits there is a scale for each token.
template <class V, bool fine>
void round_rows(const Activations& a, int columns, const int* tokens, int count) {
  using I = typename V::I;
  PromptRooms& rooms = prompt_rooms();
  const int all = padded(count, kAtOnce<V>), spans = columns / kSpan;
  const F<V> most = V::set(fine ? kMostFine : kMost);
  int8_t* codes = rooms.codes.of(size_t(all) * spans * kSpanBytes<fine>);
  float* scales = rooms.scales.of(size_t(all) * (fine ? 1 : spans));
  int32_t* shifts = rooms.shifts.of(fine ? 0 : size_t(all) * spans);
  for (int first = 0, tile; first < count; first += tile) {
    tile = tile_of<V>(count - first);
    for (int i = 0; i < std::min(tile, count - first); ++i) {
      const float* from = a.floats(tokens[first + i]);
      float top = fine ? largest<V>(from, columns) : 0;
      if (fine) scales[first + i] = top / kMostFine + top * 0;
      for (int span = 0; span < spans; ++span, from += kSpan) {
        const size_t place = size_t(first) * spans + span * tile + i;
        if (!fine) top = largest<V>(from, kSpan), scales[place] = top / kMost + top * 0;
        const F<V> back = V::set(top > 0 ? most[0] / top : 0);
        int8_t* to = codes + place * kSpanBytes<fine>;
        I sums = {};
        for (int at = 0; at < kSpan; at += V::lanes) {
          const I code = rounded<V>(V::load(from + at) * back, most);
          if constexpr (fine)
            V::put_crossed(reinterpret_cast<int16_t*>(to) + at, code);
          else
            V::put_bytes(to + at, code), sums += code;
        }
        if (!fine) shifts[place] = -kMiddle * V::sum(sums);
      }
    }
  }
}

template <class V>
void gather_rows(const Activations& a, int columns, const int* tokens, int count) {
  if constexpr (V::direct)
    if (!a.fine) return round_rows<V, false>(a, columns, tokens, count);
  round_rows<V, true>(a, columns, tokens, count);
}

// A block's codes less their zero points, in vectors of two columns of each row, or of four.
template <class V, bool fine>
void unpack_block(const Matrix& m, int block, uint8_t* to) {
  using I = typename V::I;
  const uint8_t* at = m.data + block * block_bytes(m, V::lanes);
  for (int column = 0; column < m.columns;) {
    const I zero = __builtin_convertvector(V::bytes(at + zeros_at(m, V::lanes)), I) * (fine ? 0x10001 : 0x1010101);
    at += codes_at(m, V::lanes);
    for (const int end = std::min(column + m.group, m.columns); column < end; column += 8, at += 4 * V::lanes) {
      constexpr int vectors = fine ? 4 : 2;
      unrolled<vectors>([&](auto i) {
        I own;
        if constexpr (fine)
          own = V::less(V::template pairs4<i>(at), zero);
        else
          own = (I)(i ? V::high(V::codes(at)) : V::low(V::codes(at))) + kMiddle * 0x1010101 - zero;
        V::put_whole(to + 4 * V::lanes * i, own);
      });
      to += 4 * V::lanes * vectors;
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

// A block of rows times T tokens.
template <class V, bool fine, int T>
void multiply_tile(const Matrix& m, int block, const uint8_t* weights, const Tile& tile, const Outputs& out) {
  using I = typename V::I;
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
    for (; column < end; column += kSpan, rows += T * kSpanBytes<fine>) {
      I sum[T];
      unrolled<T>([&](auto t) { sum[t] = fine ? I{} : I{} + shifts[t]; });
      for (int at = 0; at < kSpanBytes<fine>; at += 4, weights += 4 * V::lanes) {
        const I w = V::whole_at(weights);
        unrolled<T>([&](auto t) {
          const int8_t* x = rows + t * kSpanBytes<fine> + at;
          if constexpr (fine)
            sum[t] = V::add_pairs(sum[t], w, reinterpret_cast<const int16_t*>(x));
          else
            sum[t] = V::add_dots(sum[t], (typename V::Codes)w, x);
        });
      }
      unrolled<T>([&](auto t) {
        const F<V> whole = V::whole(sum[t]);
        y[t] = V::fma(fine ? whole : whole * V::set(scales[t]), s, y[t]);
      });
      if (!fine) scales += T, shifts += T;
    }
  }
  const F<V> bias = start<V>(m, block);
  unrolled<T>([&](auto t) {
    if (t < tile.count)
      put<V>(m, block, fine ? V::fma(y[t], V::set(scales[t]), bias) : y[t] + bias, out, tile.tokens[t]);
  });
}

template <class V, bool fine>
void multiply_rows(const Product& product, const int* tokens, int count) {
  constexpr int step = kAtOnce<V> / 3;
  if (count == 0) return;
  const Matrix& m = *product.matrix;
  PromptRooms& rooms = prompt_rooms();
  const int spans = m.columns / kSpan;
  uint8_t* weights = rooms.weights.of(size_t(spans) * kSpanBytes<fine> * V::lanes);
  const size_t bytes = block_bytes(m, V::lanes);
  for (int block = product.begin; block < product.end; ++block) {
    unpack_block<V, fine>(m, block, weights);
    const uint8_t *next = m.data + (block + 1) * bytes, *fetched = next;  // while tokens pass
    for (int first = 0, size; first < count; first += size) {
      size = tile_of<V>(count - first);
      if (block + 1 < product.end)
        for (; fetched < next + bytes * std::min(first + size, count) / count; fetched += 64) __builtin_prefetch(fetched);
      const size_t place = size_t(first) * spans;
      const Tile tile = {rooms.codes.of(0) + place * kSpanBytes<fine>, rooms.scales.of(0) + (fine ? first : place),
                         rooms.shifts.of(0) + (fine ? 0 : place), tokens + first, std::min(size, count - first)};
      const auto times = [&](auto T) { multiply_tile<V, fine, T>(m, block, weights, tile, product.out); };
      switch (size / step) {
        case 1: times(std::integral_constant<int, step>()); break;
        case 2: times(std::integral_constant<int, 2 * step>()); break;
        case 3: times(std::integral_constant<int, 3 * step>()); break;
      }
    }
  }
}

template <class V>
void multiply_gathered(const Product& product, const Activations& a, const int* tokens, int count) {
  if constexpr (V::direct)
    if (!a.fine) return multiply_rows<V, false>(product, tokens, count);
  multiply_rows<V, true>(product, tokens, count);
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
constexpr PromptKernels prompts_by = {nullptr, gather_rows<V>, multiply_gathered<V>, attend_prompt<V>, V::direct};

}  // namespace
}  // namespace gateskip
