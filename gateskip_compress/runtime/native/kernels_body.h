// The kernels, written once over a vector type V. Each instruction set includes this file under its own target.
//
// V gives: lanes; F, a vector of floats; I, one of 32-bit integers; load, store, set, fma, add_times, bf16 and f16 (load
// lanes of them), bytes and signed_bytes (lanes of them as floats), whole (floats of integers); Codes, 4 codes for each
// lane, with load, low and high; put_bytes and put_f16, which store codes and floats as these; sum and most, of integers;
// codes8, codes of 8 bits less `middle8`. Where `direct` is true, add_dots adds codes times the same 4 activations to a sum;
// elsewhere Sum4 and Sum8 do, with quad, which loads these, and are widened after each chunk. Where `paired` is true,
// 16-bit activations are multiplied as they are, not as two of 8: pairs4 and pairs8 give codes two by two, put_crossed
// stores activations in columns 0, 2, 1, 3 of each four, add_pairs adds the products of two with all lanes' codes.
// fetched_ahead<T> is whether weights times T tokens are fetched early: most processors' own guesses start anew on each
// page.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace gateskip {
namespace {  // each instruction set keeps its own copy: the linker must not pick one that the processor lacks

template <class V>
using F = typename V::F;

// each(0) .. each(T - 1), with constants: arrays indexed by nothing else live in registers.
template <class Each, int... t>
inline __attribute__((always_inline)) void unrolled(Each each, std::integer_sequence<int, t...>) {
  (each(std::integral_constant<int, t>()), ...);
}

template <int T, class Each>
inline __attribute__((always_inline)) void unrolled(Each each) {
  unrolled(each, std::make_integer_sequence<int, T>());
}

template <class V>
inline float total(F<V> v) {
  float lane[V::lanes], sum = 0;
  V::store(lane, v);
  for (int i = 0; i < V::lanes; ++i) sum += lane[i];
  return sum;
}

template <class V>
inline F<V> larger(F<V> a, F<V> b) {
  return a > b ? a : b;
}

// e^x by Cephes' polynomial, error 2 units in the last place; x is clamped to where the result is a normal number.
template <class V>
inline F<V> exponential(F<V> x) {
  using I = typename V::I;
  const F<V> round = V::set(12582912.0f);  // 1.5 * 2^23: what is added and taken off again is rounded to a whole number
  x = x < V::set(-87.3f) ? V::set(-87.3f) : x;
  x = x > V::set(88.3f) ? V::set(88.3f) : x;
  const F<V> shifted = V::fma(x, V::set(1.44269504f), round), n = shifted - round;
  F<V> r = V::fma(n, V::set(-0.693359375f), x);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  constexpr float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  F<V> p = V::set(1.9875691500e-4f);
  for (float term : terms) p = V::fma(p, r, V::set(term));
  p = V::fma(p * r, r, r + V::set(1.0f));
  return (F<V>)((I)p + ((I)shifted << 23));
}

// ---- products

// Bytes of a block that are fetched early.
template <class V>
constexpr int kAhead = 256 * V::lanes;

template <class V, Kind K>
struct Coded;

template <class V>
struct Coded<V, Kind::int4> {
  static constexpr int bytes = kChunk / 2 * V::lanes, columns = 8;  // columns in a vector
  static constexpr float middle = 0;
  static void load(const uint8_t* at, int pair, typename V::Codes* codes) {
    const auto both = V::codes(at + 4 * pair * V::lanes);
    codes[0] = V::low(both);
    codes[1] = V::high(both);
  }
  template <int i>
  static typename V::I pairs(const uint8_t* at) {
    return V::template pairs4<i>(at);
  }
};

template <class V>
struct Coded<V, Kind::int8> {
  static constexpr int bytes = kChunk * V::lanes, columns = 4;
  static constexpr float middle = V::middle8;
  static void load(const uint8_t* at, int pair, typename V::Codes* codes) {
    codes[0] = V::codes8(at + 8 * pair * V::lanes);
    codes[1] = V::codes8(at + (8 * pair + 4) * V::lanes);
  }
  template <int i>
  static typename V::I pairs(const uint8_t* at) {
    return V::template pairs8<i>(at);
  }
};

// Of a group of a block's rows.
template <class V>
inline F<V> group_scales(const Matrix& m, const uint8_t* at) {
  return m.short_scales ? V::f16(reinterpret_cast<const uint16_t*>(at)) : V::load(reinterpret_cast<const float*>(at));
}

template <class C, class Codes>
inline void load_chunk(const uint8_t* at, Codes (&codes)[8]) {
  for (int pair = 0; pair < 4; ++pair) C::load(at, pair, codes + 2 * pair);
}

// Compilers do not read ahead of here, into registers that they lack.
inline const uint8_t* later(const uint8_t* at) {
  asm("" : "+r"(at));
  return at;
}

// The codes of S chunks times those of T tokens, for every row of the block: whole numbers. Where the processor adds to sums
// directly, and for 16-bit activations as they are, of one chunk, the tokens' sums stay in registers while the codes pass;
// elsewhere a chunk's codes do while the tokens pass.
template <class V, Kind K, int T, bool fine, int S>
inline __attribute__((always_inline)) void chunk_dots(const uint8_t* at, const Activations& a,
                                                      const size_t (&places)[T], F<V> (&dots)[T]) {
  using C = Coded<V, K>;
  if constexpr (fine && V::paired) {
    static_assert(S == 1);
    typename V::I sum[T];
    unrolled<T>([&](auto t) { sum[t] = typename V::I{}; });
    unrolled<kChunk / C::columns>([&](auto v) {
      unrolled<C::columns / 2>([&](auto i) {
        const auto w = C::template pairs<i>(at + 4 * V::lanes * v);
        unrolled<T>([&](auto t) {
          sum[t] = V::add_pairs(sum[t], w, a.wide + places[t] * kChunk + C::columns * v + 2 * i);
        });
      });
    });
    unrolled<T>([&](auto t) { dots[t] = V::whole(sum[t]); });
  } else if constexpr (V::direct) {
    constexpr int A = T <= 2 ? 2 : 1;  // sums of a token, as each addition takes several cycles
    typename V::I sum[A * T], rest[A * T];
    const int8_t *q[T], *fines[T];
    unrolled<A * T>([&](auto i) { sum[i] = rest[i] = typename V::I{}; });
    unrolled<T>([&](auto t) {
      q[t] = a.q + places[t] * kChunk;
      if constexpr (fine) fines[t] = a.fine + places[t] * kChunk;
    });
    unrolled<S * 4>([&](auto pair) {
      typename V::Codes codes[2];
      C::load(at, pair, codes);
      unrolled<2>([&](auto c) {
        unrolled<T>([&](auto t) {
          constexpr int own = A * t + c % A, four = 8 * pair + 4 * c;
          sum[own] = V::add_dots(sum[own], codes[c], q[t] + four);
          if constexpr (fine) rest[own] = V::add_dots(rest[own], codes[c], fines[t] + four);
        });
      });
    });
    unrolled<T>([&](auto t) {
      const auto whole = [&](const auto& of) { return V::whole(A == 2 ? of[A * t] + of[A * t + A - 1] : of[t]); };
      dots[t] = whole(sum);
      if constexpr (fine) dots[t] = V::fma(dots[t], V::set(kCoarser), whole(rest));
    });
  } else {
    std::conditional_t<K == Kind::int4, typename V::Sum4, typename V::Sum8> sum[T], rest[T];
    unrolled<S>([&](auto chunk) {
      typename V::Codes codes[8];
      load_chunk<C>(at, codes);
      at = later(at + C::bytes);
      unrolled<T>([&](auto t) {
        const size_t place = (places[t] + chunk) * kChunk;
        for (int i = 0; i < 8; ++i) sum[t].add(codes[i], V::quad(a.q + place + 4 * i));
        sum[t].widen();
        if constexpr (!fine) return;
        for (int i = 0; i < 8; ++i) rest[t].add(codes[i], V::quad(a.fine + place + 4 * i));
        rest[t].widen();
      });
    });
    unrolled<T>([&](auto t) {
      dots[t] = sum[t].value();
      if constexpr (fine) dots[t] = V::fma(dots[t], V::set(kCoarser), rest[t].value());
    });
  }
}

// One block of rows times T tokens.
template <class V, Kind K, int T, bool fine>
inline void coded_block(const Matrix& m, const uint8_t* at, const Activations& a, const int* tokens, F<V> (&y)[T]) {
  using C = Coded<V, K>;
  const int chunks = (m.columns + kChunk - 1) / kChunk, per_group = m.group / kChunk;
  size_t places[T];
  unrolled<T>([&](auto t) { places[t] = size_t(tokens[t]) * a.chunks(); });
  for (int chunk = 0; chunk < chunks;) {
    const F<V> s = group_scales<V>(m, at), z = V::bytes(at + zeros_at(m, V::lanes)) - V::set(C::middle);
    at += codes_at(m, V::lanes);
    F<V> part[T];
    float shift[T];
    unrolled<T>([&](auto t) { part[t] = V::set(0), shift[t] = 0; });
    const int end = chunk + per_group < chunks ? chunk + per_group : chunks;
    const auto take = [&](auto S) {
      if constexpr (V::template fetched_ahead<T>)
        for (int byte = 0; byte < S * C::bytes; byte += 64) __builtin_prefetch(at + kAhead<V> + byte);
      F<V> dots[T];
      chunk_dots<V, K, T, fine, S>(at, a, places, dots);
      unrolled<T>([&](auto t) {
        part[t] = V::fma(dots[t], V::set(a.scale[places[t]]), part[t]);
        for (int i = 0; i < S; ++i) shift[t] += a.sum[places[t]++];
      });
      chunk += S, at += S * C::bytes;
    };
    if constexpr (!(fine && V::paired))
      while (spans(m) && chunk + 2 <= end) take(std::integral_constant<int, 2>());
    while (chunk < end) take(std::integral_constant<int, 1>());
    unrolled<T>([&](auto t) { y[t] = V::fma(V::fma(-z, V::set(shift[t]), part[t]), s, y[t]); });
  }
}

template <Kind K>
constexpr bool coded = K == Kind::int4 || K == Kind::int8;

template <class V>
inline F<V> start(const Matrix& m, int block) {
  return m.bias ? V::load(m.bias + block * V::lanes) : V::set(0);
}

// A block's rows of a token.
template <class V>
inline __attribute__((always_inline)) void put(const Matrix& m, int block, F<V> y, const Outputs& out, int token) {
  float* to = out.at + token * out.stride + block * V::lanes;
  const int left = m.rows - block * V::lanes;
  if (left >= V::lanes) return V::store(to, out.added ? V::load(to) + y : y);
  float lane[V::lanes];
  V::store(lane, y);
  for (int i = 0; i < left; ++i) to[i] = out.added ? to[i] + lane[i] : lane[i];
}

// One block times T tokens, the first `own` of which are wanted.
template <class V, Kind K, bool fine, int T, int own = T>
inline void block_times(const Matrix& m, int block, const Activations& a, const int* tokens, const Outputs& out) {
  F<V> y[T];
  for (int t = 0; t < T; ++t) y[t] = start<V>(m, block);
  coded_block<V, K, T, fine>(m, m.data + block * block_bytes(m, V::lanes), a, tokens, y);
  for (int t = 0; t < own; ++t) put<V>(m, block, y[t], out, tokens[t]);
}

// B blocks of rows times T tokens, column by column: as many sums are under way as additions take cycles.
template <class V, Kind K, int B, int T>
inline void float_blocks(const Matrix& m, int block, const Activations& a, const int* tokens, const Outputs& out) {
  using E = std::conditional_t<K == Kind::bf16, uint16_t, float>;
  const size_t apart = size_t(m.columns) * V::lanes;  // blocks
  const E* at = reinterpret_cast<const E*>(m.data) + block * apart;
  const float* x[T];
  F<V> y[B][T];
  unrolled<T>([&](auto t) { x[t] = a.floats(tokens[t]); });
  unrolled<B>([&](auto b) { unrolled<T>([&](auto t) { y[b][t] = start<V>(m, block + b); }); });
  for (int column = 0; column < m.columns; ++column, at += V::lanes) {
    F<V> w[B];
    unrolled<B>([&](auto b) {
      if constexpr (K == Kind::bf16)
        w[b] = V::bf16(at + b * apart);
      else
        w[b] = V::load(at + b * apart);
    });
    unrolled<T>([&](auto t) {
      const F<V> factor = V::set(x[t][column]);
      unrolled<B>([&](auto b) { y[b][t] = V::fma(w[b], factor, y[b][t]); });
    });
  }
  unrolled<B>([&](auto b) {
    unrolled<T>([&](auto t) { put<V>(m, block + b, y[b][t], out, tokens[t]); });
  });
}

// B blocks times all tokens, in parts as alike as can be.
template <class V, Kind K, int B>
inline void float_tokens(const Matrix& m, int block, const Activations& a, const int* tokens, int count,
                         const Outputs& out) {
  for (int parts = (count + 5) / 6; parts; --parts) {
    const int part = (count + parts - 1) / parts;
    switch (part) {
      case 1: float_blocks<V, K, B, 1>(m, block, a, tokens, out); break;
      case 2: float_blocks<V, K, B, 2>(m, block, a, tokens, out); break;
      case 3: float_blocks<V, K, B, 3>(m, block, a, tokens, out); break;
      case 4: float_blocks<V, K, B, 4>(m, block, a, tokens, out); break;
      case 5: float_blocks<V, K, B, 5>(m, block, a, tokens, out); break;
      case 6: float_blocks<V, K, B, 6>(m, block, a, tokens, out); break;
    }
    tokens += part, count -= part;
  }
}

template <class V, Kind K>
void multiply_floats(const Matrix& m, int begin, int end, const Activations& a, const int* tokens, int count,
                     const Outputs& out) {
  int block = begin;
  const auto times = [&](auto B, auto T) {  // sums, weights and a factor fit 16 registers
    for (; block + B <= end; block += B) float_blocks<V, K, B, T>(m, block, a, tokens, out);
  };
  using std::integral_constant;
  switch (count) {
    case 1: times(integral_constant<int, 8>(), integral_constant<int, 1>()); break;
    case 2: times(integral_constant<int, 4>(), integral_constant<int, 2>()); break;
    case 3: times(integral_constant<int, 3>(), integral_constant<int, 3>()); break;
    case 4: times(integral_constant<int, 3>(), integral_constant<int, 4>()); break;
  }
  for (; block + 2 <= end; block += 2) float_tokens<V, K, 2>(m, block, a, tokens, count, out);
  if (block < end) float_tokens<V, K, 1>(m, block, a, tokens, count, out);
}

template <class V, Kind K, bool fine>
void multiply_codes(const Matrix& m, int begin, int end, const Activations& a, const int* tokens, int count,
                    const Outputs& out) {
  for (int block = begin; block < end; ++block) {
    int t = 0;
    for (; t + 4 <= count; t += 4) block_times<V, K, fine, 4>(m, block, a, tokens + t, out);
    switch (count - t) {
      case 3:
        if constexpr (K == Kind::int4 && !V::direct) {  // as four, the last one twice: GCC does badly at three
          const int four[] = {tokens[t], tokens[t + 1], tokens[t + 2], tokens[t + 2]};
          block_times<V, K, fine, 4, 3>(m, block, a, four, out);
        } else {
          block_times<V, K, fine, 3>(m, block, a, tokens + t, out);
        }
        break;
      case 2: block_times<V, K, fine, 2>(m, block, a, tokens + t, out); break;
      case 1: block_times<V, K, fine, 1>(m, block, a, tokens + t, out); break;
    }
  }
}

template <class V>
void multiply_one(const Product& product, const Activations& a, const int* tokens, int count) {
  const Matrix& m = *product.matrix;
  const int begin = product.begin, end = product.end;
  const Outputs& out = product.out;
  const auto of_kind = [&](auto kind) {
    constexpr Kind K = decltype(kind)::value;
    if constexpr (!coded<K>)
      multiply_floats<V, K>(m, begin, end, a, tokens, count, out);
    else if (a.fine)
      multiply_codes<V, K, true>(m, begin, end, a, tokens, count, out);
    else
      multiply_codes<V, K, false>(m, begin, end, a, tokens, count, out);
  };
  switch (m.kind) {
    case Kind::int4: return of_kind(std::integral_constant<Kind, Kind::int4>());
    case Kind::int8: return of_kind(std::integral_constant<Kind, Kind::int8>());
    case Kind::bf16: return of_kind(std::integral_constant<Kind, Kind::bf16>());
    case Kind::f32: return of_kind(std::integral_constant<Kind, Kind::f32>());
  }
}

template <class V>
void multiply(const Product* products, int number, const Activations& a, const int* tokens, int count) {
  for (int i = 0; i < number; ++i) multiply_one<V>(products[i], a, tokens, count);
}

// ---- what goes token by token

// The largest absolute value, by bits, of which those of what is undefined are larger still.
template <class V>
inline float largest(const float* x, int count) {
  using I = typename V::I;
  I most = {};
  for (int i = 0; i < count; i += V::lanes) {
    const I size = (I)V::load(x + i) & 0x7fffffff;
    most = size > most ? size : most;
  }
  const int32_t top = V::most(most);
  float value;
  std::memcpy(&value, &top, sizeof value);
  return value;
}

// To codes from -most to most.
template <class V>
inline typename V::I rounded(F<V> x, F<V> most) {
  using I = typename V::I;
  const F<V> round = V::set(12582912.0f);
  x = x > most ? most : x;
  x = x > -most ? x : -most;
  return (I)(x + round) - (I)round;
}

// Codes of 16 bits as two bytes.
template <class V>
inline void put_code(typename V::I code, int8_t* to_q, int8_t* to_fine) {
  const typename V::I q = (code + kCoarser / 2) >> 8;
  V::put_bytes(to_q, q);
  V::put_bytes(to_fine, code - q * kCoarser);
}

template <class V>
void quantize(const Activations& a, int token, int begin, int end) {
  using I = typename V::I;
  const float most = a.fine ? kMostFine : kMost;
  float* from = a.floats(token);
  for (int column = end; column < padded(end, kChunk); ++column) from[column] = 0;
  float top = 0, scale = 0, back = 0;
  for (int column = begin; column < end; column += kChunk) {
    if ((column - begin) % kSpan == 0) {
      const int left = padded(end, kChunk) - column;
      top = largest<V>(from + column, left < kSpan ? left : kSpan);
      scale = top / most + top * 0;
      back = top > 0 ? most / top : 0;  // infinite for the smallest numbers: `rounded` holds what that throws out of range
    }
    const size_t place = size_t(token) * a.chunks() + column / kChunk;
    I sums = {};
    for (int i = 0; i < kChunk; i += V::lanes) {
      const I code = rounded<V>(V::load(from + column + i) * V::set(back), V::set(most));
      if (a.fine) {
        put_code<V>(code, a.q + place * kChunk + i, a.fine + place * kChunk + i);
        if constexpr (V::paired) V::put_crossed(a.wide + place * kChunk + i, code);
      } else {
        V::put_bytes(a.q + place * kChunk + i, code);
      }
      sums += code;
    }
    a.scale[place] = scale;
    a.sum[place] = scale * static_cast<float>(V::sum(sums));
  }
}

// To the nearest f16, as `to_f16`.
template <class V>
void halve(const float* x, int count, uint16_t* to) {
  const F<V> most = V::set(65504);
  for (int i = 0; i < count; i += V::lanes) {
    F<V> v = V::load(x + i);
    v = v > most ? most : v;
    v = v < -most ? -most : v;
    V::put_f16(to + i, v);
  }
}

template <class V>
float dot(const float* x, const float* y, int width) {
  F<V> sum = V::set(0);
  int i = 0;
  for (; i + V::lanes <= width; i += V::lanes) sum = V::fma(V::load(x + i), V::load(y + i), sum);
  float rest = total<V>(sum);
  for (; i < width; ++i) rest += x[i] * y[i];
  return rest;
}

template <class V>
void norm(const float* x, const float* weight, int width, float eps, float* y) {
  const float scale = 1 / std::sqrt(dot<V>(x, x, width) / static_cast<float>(width) + eps);
  int i = 0;
  for (; i + V::lanes <= width; i += V::lanes) V::store(y + i, V::load(x + i) * V::set(scale) * V::load(weight + i));
  for (; i < width; ++i) y[i] = x[i] * scale * weight[i];
}

template <class V>
void rotate(float* head, const float* cos, const float* sin, int count) {
  const int half = count / 2;
  const auto turn = [&](auto load, auto store, int i) {
    const auto left = load(head + i), right = load(head + half + i);
    store(head + i, left * load(cos + i) - right * load(sin + i));
    store(head + half + i, right * load(cos + half + i) + left * load(sin + half + i));
  };
  int i = 0;
  for (; i + V::lanes <= half; i += V::lanes) turn(V::load, V::store, i);
  for (; i < half; ++i)
    turn([](const float* from) { return *from; }, [](float* to, float x) { *to = x; }, i);
}

template <class V>
float exp_sum(const float* x, int count, float top) {
  F<V> sum = V::set(0);
  int i = 0;
  for (; i + V::lanes <= count; i += V::lanes) sum = sum + exponential<V>(V::load(x + i) - V::set(top));
  float rest = total<V>(sum);
  for (; i < count; ++i) rest += std::exp(x[i] - top);
  return rest;
}

template <class V>
int draw(const float* scores, int count, double chance) {
  constexpr int run = 64;
  float weights[run], rest[run], lane[V::lanes];  // the last run is filled up with what weighs nothing
  const int whole = count / run * run;
  for (int i = 0; i < run; ++i) rest[i] = whole + i < count ? scores[whole + i] : -INFINITY;
  F<V> most = V::load(rest);
  for (int i = V::lanes; i < run; i += V::lanes) most = larger<V>(V::load(rest + i), most);
  for (int i = 0; i < whole; i += V::lanes) most = larger<V>(V::load(scores + i), most);
  V::store(lane, most);
  float top = lane[0];
  for (float value : lane) top = value > top ? value : top;
  const auto weigh = [&](int begin) {  // the run from there on
    const float* from = begin < whole ? scores + begin : rest;
    F<V> sum = V::set(0);
    for (int i = 0; i < run; i += V::lanes) {
      const F<V> x = V::load(from + i) - V::set(top);
      const F<V> weight = x < V::set(-87) ? V::set(0) : exponential<V>(x);
      V::store(weights + i, weight);
      sum = sum + weight;
    }
    return static_cast<double>(total<V>(sum));
  };
  double all = 0, below = 0;
  for (int begin = 0; begin < count; begin += run) all += weigh(begin);
  int found = -1;  // the last one with any weight, should rounding leave the chance above all sums
  for (int begin = 0; begin < count; begin += run) {
    const double sum = weigh(begin);
    if (sum > 0 && below + sum <= chance * all && begin + run < count) {
      below += sum;
      continue;
    }
    for (int i = 0; i < run; ++i) {
      if (!(weights[i] > 0)) continue;
      found = begin + i;
      below += static_cast<double>(weights[i]);
      if (below > chance * all) return found;
    }
  }
  return all > 0 ? found : -1;
}

// x times the logistic function of x, or of 2 sqrt(2 / pi) (x + 0.044715 x^3), which is x (1 + tanh(half of that)) / 2.
template <class V, Activation A>
inline F<V> activated(F<V> x) {
  const F<V> z = A == Activation::silu ? x : V::set(1.5957691216f) * x * V::fma(V::set(0.044715f) * x, x, V::set(1));
  return x / (V::set(1) + exponential<V>(-z));
}

template <class V, Activation A>
void activate(const float* gate, const float* up, int width, float* y) {
  int i = 0;
  for (; i + V::lanes <= width; i += V::lanes)
    V::store(y + i, activated<V, A>(V::load(gate + i)) * V::load(up + i));
  if (i == width) return;
  float g[V::lanes] = {}, u[V::lanes] = {};
  std::memcpy(g, gate + i, sizeof(float) * (width - i));
  std::memcpy(u, up + i, sizeof(float) * (width - i));
  V::store(g, activated<V, A>(V::load(g)) * V::load(u));
  std::memcpy(y + i, g, sizeof(float) * (width - i));
}

template <class V>
void glu(const float* gate, const float* up, int width, Activation activation, float* y) {
  return activation == Activation::silu ? activate<V, Activation::silu>(gate, up, width, y)
                                        : activate<V, Activation::gelu>(gate, up, width, y);
}

// ---- attention

template <class V>
inline F<V> element(const uint16_t* at) {
  return V::f16(at);
}

template <class V>
inline F<V> element(const float* at) {
  return V::load(at);
}

template <class V>
inline F<V> element(const int8_t* at) {
  return V::signed_bytes(at);
}

template <class E>
constexpr bool scaled = sizeof(E) == 1;

inline int key_groups(int head_dim) { return (head_dim + kKeyGroup - 1) / kKeyGroup; }

// Vectors that Q queries share, so that 8 sums or more are under way and stay in registers, of which AVX-512 has twice
// as many.
template <class V, int Q>
constexpr int together = Q == 3 ? 4 : Q < 8 ? (8 + Q - 1) / Q : V::lanes > 8 ? 2 : 1;

// As `element`, and fetches what is as many positions further as Q queries' scores are computed of at once.
template <class V, int Q, class E>
inline F<V> next(const E* at, int head_dim) {
  __builtin_prefetch(at + together<V, Q> * V::lanes * head_dim);
  return element<V>(at);
}

// Scores of Q queries at the key blocks [block, block + B).
template <class V, class E, int Q, int B>
inline void score_blocks(const Queries& to, int first, int block, float (&scores)[Q][kRun]) {
  const E* keys = static_cast<const E*>(to.keys) + size_t(block) * to.head_dim * V::lanes;
  F<V> sums[B][Q] = {};
  const float* query[Q];
  for (int i = 0; i < Q; ++i) query[i] = to.query[first + i];
  const int width = to.head_dim;
  const auto add = [&](int begin, int end, F<V> (&own)[B][Q]) {
    for (int d = begin; d < end; ++d)
      unrolled<B>([&](auto b) {
        const F<V> k = next<V, Q>(keys + (size_t(b) * width + d) * V::lanes, width);
        unrolled<Q>([&](auto i) { own[b][i] = V::add_times(own[b][i], k, query[i] + d); });
      });
  };
  if constexpr (scaled<E>) {
    const int groups = key_groups(width);
    for (int group = 0; group < groups; ++group) {
      F<V> parts[B][Q] = {};
      add(group * kKeyGroup, group + 1 < groups ? (group + 1) * kKeyGroup : width, parts);
      for (int b = 0; b < B; ++b) {
        const F<V> scale = V::load(to.key_scales + (size_t(block + b) * groups + group) * V::lanes);
        for (int i = 0; i < Q; ++i) sums[b][i] = V::fma(parts[b][i], scale, sums[b][i]);
      }
    }
  } else {
    add(0, width, sums);
  }
  for (int b = 0; b < B; ++b)
    for (int i = 0; i < Q; ++i) V::store(scores[i] + size_t(block + b) * V::lanes, sums[b][i]);
}

// The scores [begin, end) to weights; the rest of the vectors that they lie in becomes 0.
template <class V>
inline void weigh(float* scores, int begin, int end, float& largest, float& weight) {
  const int first = begin / V::lanes * V::lanes, last = (end + V::lanes - 1) / V::lanes * V::lanes;
  const auto fill_up = [&](float value) {
    for (int i = first; i < begin; ++i) scores[i] = value;
    for (int i = end; i < last; ++i) scores[i] = value;
  };
  fill_up(scores[begin]);
  F<V> most = V::load(scores + first), sum = V::set(0);
  for (int i = first; i < last; i += V::lanes) most = larger<V>(V::load(scores + i), most);
  float lane[V::lanes], top = scores[begin];
  V::store(lane, most);
  for (float value : lane) top = value > top ? value : top;
  for (int i = first; i < last; i += V::lanes) V::store(scores + i, exponential<V>(V::load(scores + i) - V::set(top)));
  fill_up(0);
  for (int i = first; i < last; i += V::lanes) sum = sum + V::load(scores + i);
  largest = top, weight = total<V>(sum);
}

// Adds the values of positions [begin, end) to columns [column, column + W * lanes) of Q queries' parts.
template <class V, class E, int Q, int W>
inline __attribute__((always_inline)) void mix(const Queries& to, int first, int column, int begin, int end,
                                               const float (*weights)[kRun]) {
  F<V> sums[Q][W];
  const auto part = [&](int i, int w) { return to.part[first + i] + column + w * V::lanes; };
  unrolled<Q>([&](auto i) { unrolled<W>([&](auto w) { sums[i][w] = V::load(part(i, w)); }); });
  const E* values = static_cast<const E*>(to.values) + column;
  for (int p = begin; p < end; ++p)
    unrolled<W>([&](auto w) {
      const F<V> v = next<V, Q>(values + size_t(p) * to.head_dim + w * V::lanes, to.head_dim);
      unrolled<Q>([&](auto i) { sums[i][w] = V::add_times(sums[i][w], v, weights[i] + p); });
    });
  unrolled<Q>([&](auto i) { unrolled<W>([&](auto w) { V::store(part(i, w), sums[i][w]); }); });
}

template <class V, class E, int Q>
inline void mix_all(const Queries& to, int first, int begin, int end, const float (*weights)[kRun]) {
  constexpr int W = together<V, Q>;
  if (begin >= end) return;
  int column = 0;
  for (; column + W * V::lanes <= to.head_dim; column += W * V::lanes)
    mix<V, E, Q, W>(to, first, column, begin, end, weights);
  for (; column < to.head_dim; column += V::lanes) mix<V, E, Q, 1>(to, first, column, begin, end, weights);
}

inline int least(const int* of, int count) {
  int found = of[0];
  for (int i = 1; i < count; ++i) found = of[i] < found ? of[i] : found;
  return found;
}

inline int most(const int* of, int count) {
  int found = of[0];
  for (int i = 1; i < count; ++i) found = of[i] > found ? of[i] : found;
  return found;
}

// Q queries' parts from `first` on, by their scores. What only some of them see is added query by query, each query's
// positions in order.
template <class V, class E, int Q>
void weigh_and_mix(const Queries& to, int first, float (*scores)[kRun]) {
  const int *begins = to.begin + first, *ends = to.end + first;
  int begin = most(begins, Q), end = least(ends, Q);
  end = end > begin ? end : begin;  // all queries see [begin, end)
  for (int i = 0; i < Q; ++i) {
    float* part = to.part[first + i];
    weigh<V>(scores[i], begins[i], ends[i], part[to.head_dim], part[to.head_dim + 1]);
    if constexpr (scaled<E>)
      for (int p = begins[i] / V::lanes * V::lanes; p < ends[i]; p += V::lanes)
        V::store(scores[i] + p, V::load(scores[i] + p) * V::load(to.value_scales + p));
    std::memset(part, 0, sizeof(float) * to.head_dim);
    mix_all<V, E, 1>(to, first + i, begins[i], begin < ends[i] ? begin : ends[i], scores + i);
  }
  mix_all<V, E, Q>(to, first, begin, end, scores);
  for (int i = 0; i < Q; ++i) mix_all<V, E, 1>(to, first + i, end > begins[i] ? end : begins[i], ends[i], scores + i);
}

template <class V, class E, int Q>
void attend_some(const Queries& to, int first) {
  constexpr int B = together<V, Q>;
  const int earliest = least(to.begin + first, Q), blocks = padded(most(to.end + first, Q), V::lanes) / V::lanes;
  float scores[Q][kRun];
  int block = earliest / V::lanes;
  for (; block + B <= blocks; block += B) score_blocks<V, E, Q, B>(to, first, block, scores);
  for (; block < blocks; ++block) score_blocks<V, E, Q, 1>(to, first, block, scores);
  weigh_and_mix<V, E, Q>(to, first, scores);
}

// each(Q, first): so many of them at once, as long as there are, then fewer.
template <int Q, int... fewer, class Each>
void by_most(int count, Each each, int first = 0) {
  for (; first + Q <= count; first += Q) each(std::integral_constant<int, Q>(), first);
  if constexpr (sizeof...(fewer) > 0) by_most<fewer...>(count, each, first);
}

template <class V, class E>
void attend_all(const Queries& to) {
  by_most<12, 6, 4, 3, 2, 1>(to.count, [&](auto Q, int first) { attend_some<V, E, Q>(to, first); });
}

template <class V>
void attend(const Queries& to, Element element) {
  switch (element) {
    case Element::f32: return attend_all<V, float>(to);
    case Element::f16: return attend_all<V, uint16_t>(to);
    case Element::int8: return attend_all<V, int8_t>(to);
  }
}

template <class V>
void merge(float* parts, int runs, int head_dim, float* out) {
  const size_t size = Queries::part_size(head_dim);
  float *ends = parts + head_dim, top = ends[0], sum = 0;
  for (int run = 1; run < runs; ++run) top = ends[run * size] > top ? ends[run * size] : top;
  for (int run = 0; run < runs; ++run) {
    float* end = ends + run * size;
    end[0] = std::exp(end[0] - top);
    sum += end[0] * end[1];
  }
  for (int column = 0; column < head_dim; column += V::lanes) {
    F<V> y = V::set(0);
    for (int run = 0; run < runs; ++run)
      y = V::fma(V::set(ends[run * size]), V::load(parts + run * size + column), y);
    V::store(out + column, y / V::set(sum));
  }
}

template <class V>
constexpr Kernels table(const char* name, const PromptKernels* prompts = nullptr) {
  return {name,    V::lanes, multiply<V>, quantize<V>, halve<V>, norm<V>,  rotate<V>, dot<V>,
          exp_sum<V>, draw<V>,  glu<V>,      attend<V>,   merge<V>, prompts};
}

}  // namespace
}  // namespace gateskip
