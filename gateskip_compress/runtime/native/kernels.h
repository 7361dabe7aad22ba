// What a processor does to numbers: one table of functions per instruction set, and the layout of weights they read.
//
// A matrix is cut into blocks of `lanes` output rows. Inside a block, neighbouring bytes belong to neighbouring rows,
// so one vector holds the same columns of every row of the block, and sums need no horizontal additions:
//
//   int4  for each group: lanes scales (float, or float16), lanes zero points (byte); then for each 8 columns, for each
//         row, 4 bytes: column c in the low half of byte c, column 4 + c in its high half
//   int8  the same, with 4 columns in 4 bytes
//   bf16, f32  for each column, one value per row
//
// Activations are rounded in spans of 64 that share a scale: to 8 bits, x = scale * q, or to 16, in two bytes, 256 * q
// + fine in place of q. With codes w, zero points z and weight scales s of a group,
//
//   y = bias + sum over groups of s * (sum over spans of scale * (w · q) - z * sum over spans of scale * sum(q))
//
// Sums over a span, or over a chunk of 32 where groups are not whole spans, are exact integers, rounded once to float.
// Every float operation of a token is done in the same order however many tokens there are in a call, so k tokens in
// one call give the bits of k calls: speculation rests on it. (`PromptKernels` have an order of their own.) The files
// are compiled without contraction of a * b + c, which would leave that order to the compiler.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace gateskip {

constexpr int kChunk = 32;       // columns that are taken together: weights and activations are padded to whole ones
constexpr int kSpan = 64;        // activations that share a scale
constexpr int kCoarser = 256;    // steps of `fine` in one of `q`
constexpr int kMost = 127;       // of `q`
constexpr int kMostFine = kMost * kCoarser + 127;
constexpr int kKeyGroup = 32;    // channels of a head's keys of 8 bits that share a scale
constexpr int kMostQueries = 12;  // that one call of `attend` takes
constexpr int kRun = 256;        // positions that it takes; a multiple of kMostLanes
constexpr int kMostLanes = 16;   // of all kernels

enum class Kind { int4, int8, bf16, f32 };
enum class Element { f32, f16, int8 };  // of remembered keys and values
enum class Activation { silu, gelu };   // the latter by tanh

// Packed weights (see `pack.h`); the memory belongs to someone else.
struct Matrix {
  Kind kind = Kind::f32;
  int rows = 0, columns = 0, group = 0;
  bool short_scales = false;  // of groups: float16
  const uint8_t* data = nullptr;
  const float* bias = nullptr;  // one per row, padded to whole blocks; or none
};

// The inputs of a product, as floats and rounded, for many tokens.
struct Activations {
  int columns = 0;  // whole chunks
  float* x = nullptr;
  uint16_t* halves = nullptr;  // or none: for `PromptKernels`, of a token the nearest bfloat16, then what they leave
  int8_t* q = nullptr;
  int8_t* fine = nullptr;   // or none: 8 bits
  int16_t* wide = nullptr;  // kCoarser * q + fine; of four columns 0, 2, 1, 3; for kernels that read pairs
  float* scale = nullptr;  // per chunk; the same in a span
  float* sum = nullptr;    // per chunk: scale * the sum of its codes

  int chunks() const { return columns / kChunk; }
  size_t halves_apart() const { return 2 * size_t(columns) + 32; }  // tokens; never a whole page, where cache sets repeat
  float* floats(int token) const { return x + size_t(token) * columns; }
};

// Where products go: at[token * stride + row], in place of what is there or added to it.
struct Outputs {
  float* at;
  size_t stride;
  bool added = false;
};

// Rows of the blocks [begin, end).
struct Product {
  const Matrix* matrix;
  int begin, end;
  Outputs out;
};

// Queries that read the same keys and values, those of a run of positions. Keys lie in blocks of `lanes` positions,
// [block][head_dim][lanes]; values lie by position, [position][head_dim]. Elements of 8 bits are times scales: of
// keys, [block][group of kKeyGroup channels][lanes]; of values, by position. What a query gets from a run is a part of
// its softmax: `top`, the largest score; `sum`, of the weights e^(score - top); and the sum of the values times these.
// Parts of any runs are merged as in FlashDecoding.
struct Queries {
  int count;                               // 1..kMostQueries
  const float* query[kMostQueries];        // already scaled
  float* part[kMostQueries];               // head_dim values, top, sum
  int begin[kMostQueries], end[kMostQueries];  // positions of the run that the query sees, at least one
  const void *keys, *values;               // of the run's first position
  const float *key_scales, *value_scales;  // of the run's first position; or none
  int head_dim;

  static int part_size(int head_dim) { return head_dim + 2; }
};

// A prompt's query: what it is times, where what it attends to goes, and the positions that it sees.
struct PromptQuery {
  const float* x;  // already scaled
  float* out;
  int begin, end;
};

// Queries of one head's keys and values; those lie as of `Queries`, from position 0 on.
struct PromptQueries {
  int count;
  const PromptQuery* queries;
  const void *keys, *values;
  const float *key_scales, *value_scales;
  int head_dim;
};

// Many tokens of one sequence, where a processor has a faster way for them: attention, products of bf16, and of 4-bit
// codes. What is multiplied by floats is a sum of two bfloat16 (16 bits), or of 8-bit activations the nearest one; by
// codes, activations of 16 bits (or 15) whose whole rows share a scale, or of 8 as elsewhere; scores may be of queries
// and keys of 13 bits. Sums are about as exact as `Kernels`', but added up in another order: bits differ, so verifying
// drafts, which is compared with single steps, goes no such way.
struct PromptKernels {
  void (*split)(const Activations&, int token, int begin, int end);  // as `quantize`; or none, and no products of bf16
  // Rounds what the calling thread's next products of codes read, the tokens' first `columns`, which are whole spans.
  void (*gather)(const Activations&, int columns, const int* tokens, int count);
  void (*multiply)(const Product&, const Activations&, const int* tokens, int count);
  void (*attend)(const PromptQueries&, Element);

  bool eight_bits = false;  // products of codes and activations of 8 bits too

  // Whether there is such a product, of activations of 16 bits or 8.
  bool suits(const Matrix& m, bool fine) const;
};

struct Kernels {
  const char* name;
  int lanes;
  // For the tokens listed.
  void (*multiply)(const Product*, int products, const Activations&, const int* tokens, int count);
  // Rounds a token's floats from column `begin`, the first of a span, to `end`, and zeros the rest of the last chunk.
  // An infinite or undefined value makes its span's scale undefined, and so every output.
  void (*quantize)(const Activations&, int token, int begin, int end);
  void (*halve)(const float* x, int count, uint16_t* to);  // to the nearest f16, finite as `to_f16`; whole vectors
  // y = weight * x / sqrt(mean(x²) + eps); y may be x.
  void (*norm)(const float* x, const float* weight, int width, float eps, float* y);
  // The first `count` channels of a head, turned by half-split rotary positions (arXiv 2104.09864).
  void (*rotate)(float* head, const float* cos, const float* sin, int count);
  float (*dot)(const float* x, const float* y, int width);
  // Sum of e^(x - top).
  float (*exp_sum)(const float* x, int count, float top);
  // An entry as likely as the softmax of the scores says, by a number from 0 to below 1; -1 where that is undefined.
  int (*draw)(const float* scores, int count, double chance);
  // y = activation(gate) * up
  void (*glu)(const float* gate, const float* up, int width, Activation, float* y);
  void (*attend)(const Queries&, Element);
  // What a query gets from all its runs, by their parts, which lie one after the other and are lost.
  void (*merge)(float* parts, int runs, int head_dim, float* out);
  const PromptKernels* prompts;  // or none
};

#if defined(__x86_64__) && defined(__GNUC__)
#define GATESKIP_X86 1
extern const Kernels avx512_kernels, zen4_kernels, avxvnni_kernels, avx2_kernels;
#else
#define GATESKIP_X86 0
#endif
#if GATESKIP_X86 && defined(__linux__)  // elsewhere nobody says how a process gets AMX's registers
#define GATESKIP_AMX 1
extern const Kernels amx_kernels;
extern const PromptKernels amx_prompts;
#else
#define GATESKIP_AMX 0
#endif
extern const Kernels portable_kernels;

// Those that this processor can run, the fastest first; the last, `portable`, runs anywhere.
std::vector<const Kernels*> usable_kernels();

inline int blocks(const Matrix& m, int lanes) { return (m.rows + lanes - 1) / lanes; }

// The first byte of a cache line from here on.
inline uint8_t* at_line(uint8_t* from) { return from + (64 - reinterpret_cast<uintptr_t>(from) % 64) % 64; }

inline int padded(int value, int step) { return (value + step - 1) / step * step; }

inline int runs_of(int positions) { return padded(positions, kRun) / kRun; }

inline int groups(const Matrix& m) { return (m.columns + m.group - 1) / m.group; }

// Whether sums run over whole spans.
inline bool spans(const Matrix& m) { return m.group % kSpan == 0; }

// The same, and the last one is whole too, as tiles take them.
inline bool whole_spans(const Matrix& m) { return spans(m) && m.columns % kSpan == 0; }

inline bool PromptKernels::suits(const Matrix& m, bool fine) const {
  return m.kind == Kind::bf16 ? split != nullptr : m.kind == Kind::int4 && whole_spans(m) && (fine || eight_bits);
}

// A group's zero points lie so far behind its scales, and its codes behind these.
inline int zeros_at(const Matrix& m, int lanes) { return (m.short_scales ? 2 : 4) * lanes; }
inline int codes_at(const Matrix& m, int lanes) { return zeros_at(m, lanes) + lanes; }

inline size_t block_bytes(const Matrix& m, int lanes) {
  if (m.kind == Kind::bf16) return size_t(m.columns) * lanes * 2;
  if (m.kind == Kind::f32) return size_t(m.columns) * lanes * 4;
  const size_t codes = size_t(padded(m.columns, kChunk)) * lanes;
  return size_t(groups(m)) * codes_at(m, lanes) + (m.kind == Kind::int4 ? codes / 2 : codes);
}

}  // namespace gateskip
