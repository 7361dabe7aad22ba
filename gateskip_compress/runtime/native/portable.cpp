// Kernels in plain C++ and the compiler's own vectors, for any processor.
#include "kernels_body.h"

namespace gateskip {
namespace {

struct Portable {
  static constexpr int lanes = 4;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  struct Codes {
    uint8_t byte[4 * lanes];
  };
  struct Quad {
    int8_t value[4];
  };

  static F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
  static F set(float x) { return F{x, x, x, x}; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F bf16(const uint16_t* p) {
    I v;
    for (int i = 0; i < lanes; ++i) v[i] = static_cast<int32_t>(uint32_t(p[i]) << 16);
    return (F)v;
  }
  static F bytes(const uint8_t* p) {
    F v;
    for (int i = 0; i < lanes; ++i) v[i] = p[i];
    return v;
  }

  static Codes codes(const uint8_t* p) {
    Codes c;
    std::memcpy(&c, p, sizeof c);
    return c;
  }
  static Codes low(Codes c) {
    for (uint8_t& byte : c.byte) byte &= 15;
    return c;
  }
  static Codes high(Codes c) {
    for (uint8_t& byte : c.byte) byte >>= 4;
    return c;
  }
  static Quad quad(const int8_t* p) {
    Quad q;
    std::memcpy(&q, p, sizeof q);
    return q;
  }
  struct Sum4 {
    int32_t sum[lanes] = {};
    void add(const Codes& w, Quad q) {
      for (int i = 0; i < lanes; ++i)
        for (int c = 0; c < 4; ++c) sum[i] += w.byte[4 * i + c] * q.value[c];
    }
    F value() const {
      F v;
      for (int i = 0; i < lanes; ++i) v[i] = static_cast<float>(sum[i]);
      return v;
    }
  };
  using Sum8 = Sum4;
  static constexpr float middle8 = 0;
};

}  // namespace

const Kernels portable_kernels = table<Portable>("portable");

}  // namespace gateskip
