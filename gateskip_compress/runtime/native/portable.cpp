// Kernels in plain C++ and the compiler's own vectors, for any processor.
#include <algorithm>

#include "kernels_body.h"
#include "pack.h"

namespace gateskip {
namespace {

struct Portable {
  static constexpr int lanes = 4;
  template <int tokens>
  static constexpr bool fetched_ahead = true;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef int16_t Shorts __attribute__((vector_size(16)));
  using Codes = I;  // 4 codes in each lane
  struct Quad {
    Shorts even, odd;  // activations 0 and 2, 1 and 3, for each lane
  };

  static F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
  static F set(float x) { return F{x, x, x, x}; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F add_times(F sum, F v, const float* x) { return sum + v * *x; }
  static F bf16(const uint16_t* p) {
    I v;
    for (int i = 0; i < lanes; ++i) v[i] = static_cast<int32_t>(uint32_t(p[i]) << 16);
    return (F)v;
  }
  static F f16(const uint16_t* p) {
    I v;
    for (int i = 0; i < lanes; ++i) v[i] = p[i];
    const I size = (v & 0x7fff) << 13, undefined = (v & 0x7c00) == 0x7c00;  // where true, all bits are set
    const F scaled = (F)size * set(0x1p112f);
    return (F)((I)scaled | (undefined & 0x7f800000) | (v & 0x8000) << 16);
  }
  static F bytes(const uint8_t* p) {
    F v;
    for (int i = 0; i < lanes; ++i) v[i] = p[i];
    return v;
  }
  static F signed_bytes(const int8_t* p) {
    F v;
    for (int i = 0; i < lanes; ++i) v[i] = p[i];
    return v;
  }

  static int32_t sum(I v) { return v[0] + v[1] + v[2] + v[3]; }
  static int32_t most(I v) { return std::max(std::max(v[0], v[1]), std::max(v[2], v[3])); }
  static void put_bytes(int8_t* to, I v) {
    for (int i = 0; i < lanes; ++i) to[i] = static_cast<int8_t>(v[i]);
  }
  static void put_f16(uint16_t* to, F v) {
    for (int i = 0; i < lanes; ++i) to[i] = to_f16(v[i]);
  }

  static Codes codes(const uint8_t* p) {
    Codes c;
    std::memcpy(&c, p, sizeof c);
    return c;
  }
  static Codes low(Codes c) { return c & 0x0f0f0f0f; }
  static Codes high(Codes c) { return low(c >> 4); }
  static Quad quad(const int8_t* q) {
    return {Shorts{q[0], q[2], q[0], q[2], q[0], q[2], q[0], q[2]},
            Shorts{q[1], q[3], q[1], q[3], q[1], q[3], q[1], q[3]}};
  }
  static Shorts even(Codes w) { return (Shorts)(w & 0x00ff00ff); }
  static Shorts odd(Codes w) { return even(w >> 8); }
  static I halves(Shorts s) { return ((I)s << 16 >> 16) + ((I)s >> 16); }
  static constexpr bool direct = false;
  // 16-bit sums, which 8 times 2 products of 15 * 128 fit.
  struct Sum4 {
    I sum = {};
    Shorts narrow = {};
    void add(Codes w, Quad q) { narrow += even(w) * q.even + odd(w) * q.odd; }
    void widen() { sum += halves(narrow), narrow = Shorts{}; }
    F value() const { return __builtin_convertvector(sum, F); }
  };
  struct Sum8 {
    I sum = {};
    void add(Codes w, Quad q) { sum += halves(even(w) * q.even) + halves(odd(w) * q.odd); }
    void widen() {}
    F value() const { return __builtin_convertvector(sum, F); }
  };
  static constexpr float middle8 = 0;
  static Codes codes8(const uint8_t* p) { return codes(p); }
  static constexpr bool paired = false;
};

}  // namespace

const Kernels portable_kernels = table<Portable>("portable");

}  // namespace gateskip
