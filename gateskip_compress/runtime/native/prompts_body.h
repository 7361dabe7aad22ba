// Prompts by vectors, written once over a V as `kernels_body.h` is, and included after it: products of 4-bit codes, of
// which a block of rows is unpacked once for all tokens; attention, as of a few tokens, for any number. V gives
// besides: less, of 16-bit integers; whole_at and put_whole, which load and store I at cache lines; for `Way::sums`
// add_products, which adds products of pairs, plus, of 32 bits to all lanes, and neighbours, products of lanes next to
// each other.

namespace gateskip {
namespace {

// Rows in tiles of those that are multiplied at once: by span and row codes, shifts and scales.
struct Rows {
  Room<int8_t> codes;
  Room<int32_t> shifts;
  Room<float> scales;
};

struct PromptRooms {
  Rows inputs, queries;
  Room<uint8_t> weights, keys;
  Room<float> key_scales, parts;
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

// each(size), a constant.
template <class V, class Each>
inline void of_tile(int size, Each each) {
  constexpr int step = kAtOnce<V> / 3;
  switch (size / step) {
    case 1: return each(std::integral_constant<int, step>());
    case 2: return each(std::integral_constant<int, 2 * step>());
    case 3: return each(std::integral_constant<int, 3 * step>());
  }
}

// How codes w of weights are multiplied by activations a: `pairs` of 16 bits; `fours` of 8, where processors add these to
// sums directly; or `sums` in pairs, where they add beside multiplying: (w0 + a1) (w1 + a0) has w0 a0 + w1 a1 in it for
// one multiplication (Winograd, "A New Algorithm for Inner Product", IEEE Transactions on Computers, 1968). What it has
// besides is what it would be with all a at 0, and with all w at 0, less with both: so much is taken off a span's sum,
// which may have wrapped around, as what is left fits.
enum class Way { fours, pairs, sums };

// Weights less their zero points, -15 to 15, are moved up by kMiddle, as the multiplications of `fours` want no sign;
// of `sums` activations are too, as one addition of 32 bits is to be two of 16, and a bit less of them fits.
constexpr int kMiddle = 15, kMostSummed = (0x7fff - 2 * kMiddle) / 2;

template <Way way>
constexpr int kMostOf = way == Way::fours ? kMost : way == Way::pairs ? kMostFine : kMostSummed;

// Of activations; for each row of weights, those and what `sums` give where all activations are 0, negative.
template <Way way>
constexpr int kSpanBytes = way == Way::fours ? kSpan : 2 * kSpan;
template <Way way>
constexpr int kSpanWeights = kSpanBytes<way> + (way == Way::sums ? 4 : 0);

// A span's first `count` floats, times `back`, to codes; the others are 0. Shifts make up for what is moved up, codes
// of weights by `middle`.
template <class V, Way way>
int32_t round_span(const float* from, int count, float back, int most, int middle, int8_t* to) {
  using I = typename V::I;
  I sums = {};
  for (int at = 0; at < kSpan; at += V::lanes) {
    I code = at < count ? rounded<V>(V::load(from + at) * V::set(back), V::set(most)) : I{};
    if constexpr (way == Way::fours) {
      V::put_bytes(to + at, code), sums += code;
    } else {
      if constexpr (way == Way::sums) code += most, sums += V::neighbours(code + middle);
      V::put_crossed(reinterpret_cast<int16_t*>(to) + at, code);
    }
  }
  if (way == Way::pairs) return 0;
  if (way == Way::fours) return -middle * V::sum(sums);
  const uint32_t neither = most + middle;  // a weight and an activation that stand for 0
  return static_cast<int32_t>(kSpan / 2 * neither * neither - static_cast<uint32_t>(V::sum(sums)));
}

inline float scale_of(float top, int most) { return top / most + top * 0; }  // undefined if `top` is
inline float back_of(float top, int most) { return top > 0 ? most / top : 0; }

// By tile, span and token: codes, of 16 bits in the order of `wide`; but for `pairs`, shifts. `fours` have scales in
// the same order; others have one for each token.
template <class V, Way way>
void round_rows(const Activations& a, int columns, const int* tokens, int count) {
  constexpr bool own_scales = way == Way::fours;  // of spans
  constexpr int most = kMostOf<way>;
  Rows& to = prompt_rooms().inputs;
  const int all = padded(count, kAtOnce<V>), spans = columns / kSpan;
  int8_t* codes = to.codes.of(size_t(all) * spans * kSpanBytes<way>);
  int32_t* shifts = to.shifts.of(size_t(all) * spans);
  float* scales = to.scales.of(size_t(all) * (own_scales ? spans : 1));
  for (int first = 0, tile; first < count; first += tile) {
    tile = tile_of<V>(count - first);
    for (int i = 0; i < std::min(tile, count - first); ++i) {
      const float* from = a.floats(tokens[first + i]);
      float top = own_scales ? 0 : largest<V>(from, columns);
      if (!own_scales) scales[first + i] = scale_of(top, most);
      for (int span = 0; span < spans; ++span, from += kSpan) {
        const size_t place = size_t(first) * spans + span * tile + i;
        if (own_scales) top = largest<V>(from, kSpan), scales[place] = scale_of(top, most);
        shifts[place] = round_span<V, way>(from, kSpan, back_of(top, most), most, kMiddle,
                                           codes + place * kSpanBytes<way>);
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

// Codes, shifts and scales of tokens that are multiplied at once, the first `count` of which are wanted.
struct Tile {
  const int8_t* rows;
  const int32_t* shifts;
  const float* scales;
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
      shifts += T;
      if (own_scales) scales += T;
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
      const Tile tile = {rooms.inputs.codes.of(0) + place * kSpanBytes<way>, rooms.inputs.shifts.of(0) + place,
                         rooms.inputs.scales.of(0) + (way == Way::fours ? place : first), tokens + first,
                         std::min(size, count - first)};
      of_tile<V>(size, [&](auto T) { multiply_tile<V, way, T>(m, block, weights, tile, product.out); });
    }
  }
}

template <class V, Way way>
void multiply_gathered(const Product& product, const Activations& a, const int* tokens, int count) {
  if constexpr (V::direct)
    if (!a.fine) return multiply_rows<V, Way::fours>(product, tokens, count);
  multiply_rows<V, way>(product, tokens, count);
}

// Where processors add products to sums directly, scores are such products too, of queries and keys that are not kept
// in float32, up to this: a span's sum fits 32 bits.
constexpr int kMostScored = 5792;

// Of a block of keys.
template <class V, class E>
inline F<V> channel_of(const PromptQueries& of, int block, int channel) {
  const int d = of.head_dim;
  const F<V> k = element<V>(static_cast<const E*>(of.keys) + (size_t(block) * d + channel) * V::lanes);
  if constexpr (!scaled<E>) return k;
  return k * V::load(of.key_scales + (size_t(block) * key_groups(d) + channel / kKeyGroup) * V::lanes);
}

// A block of keys as `unpack_block` leaves weights, and a scale of each.
template <class V, class E, Way way>
void round_keys(const PromptQueries& of, int block, uint8_t* to, float* scales) {
  using I = typename V::I;
  const int d = of.head_dim;
  const F<V> most = V::set(kMostScored);
  const I up = I{} + (way == Way::sums ? kMostScored : 0), none = I{} + kMostScored * 0x10001;
  I sizes = {};  // as in `largest`
  for (int channel = 0; channel < d; ++channel) {
    const I size = (I)channel_of<V, E>(of, block, channel) & 0x7fffffff;
    sizes = size > sizes ? size : sizes;
  }
  const F<V> top = (F<V>)sizes, back = top > 0 ? most / top : V::set(0);
  V::store(scales, top / most + top * 0);
  for (int channel = 0; channel < d;) {
    I alone = {};
    for (const int span = channel + kSpan; channel < span; channel += 4, to += 8 * V::lanes) {
      I own[4];
      unrolled<4>([&](auto i) {
        own[i] = up;
        if (channel + i < d) own[i] += rounded<V>(channel_of<V, E>(of, block, channel + i) * back, most);
      });
      const I even = (own[0] & 0xffff) | own[2] << 16, odd = (own[1] & 0xffff) | own[3] << 16;
      V::put_whole(to, even), V::put_whole(to + 4 * V::lanes, odd);
      if constexpr (way == Way::sums) alone = V::add_products(alone, even + none, odd + none);
    }
    if constexpr (way == Way::sums) V::put_whole(to, -alone), to += 4 * V::lanes;
  }
}

// The i-th query of a tile.
template <class V, Way way>
void round_query(const float* x, int head_dim, int i, int tile, Rows& to) {
  const float top = largest<V>(x, head_dim);
  to.scales.of(0)[i] = scale_of(top, kMostScored);
  for (int at = 0, place = i; at < head_dim; at += kSpan, place += tile)
    to.shifts.of(0)[place] = round_span<V, way>(x + at, std::min(kSpan, head_dim - at), back_of(top, kMostScored),
                                                kMostScored, kMostScored, to.codes.of(0) + place * kSpanBytes<way>);
}

// Scores of T queries at a block of keys.
template <class V, Way way, int T>
void score_tile(const uint8_t* keys, const float* key_scales, Rows& queries, int spans, float* const* to) {
  const int8_t* rows = queries.codes.of(0);
  F<V> y[T];
  unrolled<T>([&](auto t) { y[t] = V::set(0); });
  for (int span = 0; span < spans; ++span, keys += kSpanWeights<way> * V::lanes) {
    typename V::I sum[T];
    span_dots<V, way, T>(keys, rows + span * T * kSpanBytes<way>, queries.shifts.of(0) + span * T, sum);
    unrolled<T>([&](auto t) { y[t] = y[t] + V::whole(sum[t]); });
  }
  const F<V> s = V::load(key_scales);
  unrolled<T>([&](auto t) { V::store(to[t], y[t] * (s * V::set(queries.scales.of(0)[t]))); });
}

template <class V, class E, Way way>
void attend_queries(const PromptQueries& to, Element element) {
  constexpr bool by_codes = V::direct && sizeof(E) < sizeof(float);
  constexpr int most = by_codes ? kAtOnce<V> : kMostQueries;
  const int d = to.head_dim, spans = padded(d, kSpan) / kSpan;
  PromptRooms& rooms = prompt_rooms();
  int begin = to.queries[0].begin, end = 0;
  for (int i = 0; i < to.count; ++i)
    begin = std::min(begin, to.queries[i].begin), end = std::max(end, to.queries[i].end);
  const int first_block = begin / V::lanes, blocks = padded(end, V::lanes) / V::lanes - first_block;
  const size_t apart = size_t(spans) * kSpanWeights<way> * V::lanes;  // of blocks
  if constexpr (by_codes) {
    rooms.queries.codes.of(most * spans * kSpanBytes<way>), rooms.queries.shifts.of(most * spans);
    rooms.queries.scales.of(most), rooms.keys.of(blocks * apart), rooms.key_scales.of(blocks * V::lanes);
    for (int i = 0; i < blocks; ++i)
      round_keys<V, E, way>(to, first_block + i, rooms.keys.of(0) + i * apart, rooms.key_scales.of(0) + i * V::lanes);
  }
  const size_t size = Queries::part_size(d);
  Queries now;
  now.head_dim = d;
  for (int first = 0; first < to.count; first += most) {
    const int count = std::min(most, to.count - first), tile = by_codes ? tile_of<V>(count) : count;
    const PromptQuery* queries = to.queries + first;
    int first_run = queries[0].begin / kRun, end_run = 0;
    for (int i = 0; i < count; ++i) {
      first_run = std::min(first_run, queries[i].begin / kRun), end_run = std::max(end_run, runs_of(queries[i].end));
      if constexpr (by_codes) round_query<V, way>(queries[i].x, d, i, tile, rooms.queries);
    }
    const size_t part = size * (end_run - first_run);
    float* parts = rooms.parts.of(most * part);
    for (int run = first_run; run < end_run; ++run) {
      const int from = run * kRun;
      now.keys = static_cast<const E*>(to.keys) + size_t(from) * d;
      now.values = static_cast<const E*>(to.values) + size_t(from) * d;
      if constexpr (scaled<E>)
        now.key_scales = to.key_scales + size_t(from) * key_groups(d), now.value_scales = to.value_scales + from;
      float scores[most + 1][kRun], *rows[most];  // the last of queries that see nothing here, or are none
      int earliest = kRun, latest = 0;
      now.count = 0;
      for (int i = 0; i < tile; ++i) {
        const int own = i < count ? std::max(queries[i].begin - from, 0) : kRun,
                  last = i < count ? std::min(queries[i].end - from, kRun) : 0;
        rows[i] = scores[own < last ? now.count : most];
        if (own >= last) continue;
        now.query[now.count] = queries[i].x, now.part[now.count] = parts + i * part + (run - first_run) * size;
        now.begin[now.count] = own, now.end[now.count++] = last;
        earliest = std::min(earliest, own), latest = std::max(latest, last);
      }
      if (now.count == 0) continue;
      if constexpr (by_codes) {
        for (int at = earliest / V::lanes * V::lanes; at < latest; at += V::lanes) {
          const int block = (from + at) / V::lanes - first_block;
          float* here[most];
          for (int i = 0; i < tile; ++i) here[i] = rows[i] + at;
          of_tile<V>(tile, [&](auto T) {
            score_tile<V, way, T>(rooms.keys.of(0) + block * apart, rooms.key_scales.of(0) + block * V::lanes,
                                  rooms.queries, spans, here);
          });
        }
        by_most<12, 6, 4, 3, 2, 1>(now.count, [&](auto Q, int at) { weigh_and_mix<V, E, Q>(now, at, scores + at); });
      } else {
        attend<V>(now, element);
      }
    }
    for (int i = 0; i < count; ++i) {
      const int own = queries[i].begin / kRun;
      merge<V>(parts + i * part + (own - first_run) * size, runs_of(queries[i].end) - own, d, queries[i].out);
    }
  }
}

template <class V, Way way>
void attend_prompt(const PromptQueries& to, Element element) {
  if (to.count == 0) return;
  switch (element) {
    case Element::f32: return attend_queries<V, float, way>(to, element);
    case Element::f16: return attend_queries<V, uint16_t, way>(to, element);
    case Element::int8: return attend_queries<V, int8_t, way>(to, element);
  }
}

// Those whose activations of 16 bits go such a way.
template <class V, Way way>
constexpr PromptKernels prompts_by = {nullptr, gather_rows<V, way>, multiply_gathered<V, way>, attend_prompt<V, way>,
                                      V::direct};

}  // namespace
}  // namespace gateskip
