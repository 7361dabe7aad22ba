// A model of the Llama or Gemma 3 family that decodes: blocks of attention and MLP with gates, over a cache of keys and
// values.
//
// A call runs any tokens: one of one sequence (decoding), several of one (a prompt, or drafted tokens to verify), or one
// of each of several. A token is a row of the cache and a position in it; it sees that row's positions up to its own.
// What a token gives does not depend on the others in its call, up to rounding where that is a prompt.
//
// Threads share out rows of weights, and meet after each product; of a long prompt they share out the tokens, each of
// which then stays in one core's cache, and meet where one looks at others' keys and values.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <memory>
#include <vector>

#include "cache.h"
#include "kernels.h"
#include "team.h"

namespace gateskip {

constexpr int kWindow = 256;  // tokens of one call; where prompts have a way of their own, so many for each thread,
constexpr int kShared = 4;    // up to so many threads
constexpr int kApart = 128;   // tokens of a thread for which it is worth its while to unpack all weights by itself
constexpr int kLogits = 16;   // tokens whose logits are held at once
constexpr int kFew = 8;       // tokens among which threads share out attention by runs of positions
constexpr int kSpans = 4;     // of gated units that are multiplied before they are rounded
constexpr int kPrompt = 9;    // tokens of a prompt that go `PromptKernels`' way, where there is one
constexpr double kAdapt = 1.0 / 16;  // of what a call says about threads' shares
constexpr int kRescored = 32;  // of the largest logits

// What a skipped token adds to the stream: down(silu(gate x) * up x) with an `up`, down(gate x) without, or `offset`.
struct Surrogate {
  Matrix gate, up, down;
  std::vector<float> offset;

  bool empty() const { return !down.data && offset.empty(); }
};

struct Branch {
  std::vector<float> norm, post;  // before it; of what it gives, or none
  bool gated = false, follows = false;  // a gate of its own, or the decision of the block's attention
  std::vector<float> score;
  float bias = 0;
  Surrogate surrogate;
};

struct Layer {
  Branch attention, mlp;
  Branch draft_attention, draft_mlp;  // of models that draft with gates of their own
  Matrix q, k, v, o, gate, up, down;  // a branch that was taken out has none: its surrogate, if any, is for all tokens
  std::vector<float> q_norm, k_norm;  // per channel of a head, or none
  int rotation = 0;                   // of the model's, or -1
  int window = 0;                     // positions that a token sees, its own the last; or 0: all
  bool copies = false;                // tokens that skip attention take keys and values of the layer below

  int heads = 0, kv_heads = 0;  // by `prepare`, and which of a row's kept heads is the first
  size_t first_head = 0;
};

// Rotary positions: (context, rotated), of `Shape`.
struct Rotation {
  const float *cos = nullptr, *sin = nullptr;
};

// Rows of `width` floats, as someone else holds them; or of packed codes.
struct Table {
  const void* data = nullptr;
  bool bf16 = false;
  Matrix codes;  // where it has data, these are the rows
};

struct Shape {
  int width = 0, head_dim = 0, inner = 0, vocabulary = 0;
  int rows = 1, context = 0;  // of the cache
  int rotated = 0;            // channels of a head that turn with the position
  float eps = 0, scale = 0;   // of norms; of queries
  float enlarged = 1;         // what rows of the embedding are multiplied with
  Activation activation = Activation::silu;
  Element element = Element::f16;  // of the cache
  bool fine = true;  // activations of 16 bits instead of 8
};

struct Call {
  int count = 0;
  const int32_t *ids = nullptr, *rows = nullptr, *positions = nullptr;
  bool draft = false;  // by the gates for drafting
  bool prompt = false;  // neighbouring tokens of one row, which may go the way of prompts
  const float* thresholds = nullptr;  // attention of layer l at 2l, its MLP at 2l + 1; or none: all run
  int wanted = 0;
  const int32_t* want = nullptr;  // tokens whose logits are computed
  int vocabulary = 0;             // entries that are looked at: the first ones; whole blocks of rows, or all
  float* logits = nullptr;        // (wanted, vocabulary), or none
  int32_t* best = nullptr;        // (wanted): the first of the largest logits
  float* shares = nullptr;        // (wanted), or none: what the softmax of the logits gives it
  uint8_t* kept = nullptr;        // (2 layers, count), or none
  float* scores = nullptr;        // the same; of gates that were evaluated
};

struct Logit {
  float value = -std::numeric_limits<float>::infinity();
  int32_t index = -1;

  // Larger ones come first, of equal ones those of the first tokens, and last, whatever they are, those of none.
  bool operator<(const Logit& other) const {
    if ((index < 0) != (other.index < 0)) return other.index < 0;
    return value > other.value || (value == other.value && index < other.index);
  }
};

class Model {
 public:
  Model(const Shape& shape, const Kernels& kernels, int threads);

  std::vector<Layer> layers;
  std::vector<float> norm;
  Matrix head, quick_head;      // (vocabulary, width); the latter, where there is one, finds best tokens alone
  Table embedding, exact_head;  // likewise; the latter corrects the largest logits of `quick_head`; floats, those of `head`
  std::vector<Rotation> rotations;

  const Shape shape;
  const Kernels& kernels;
  const int window;  // tokens that a call may have

  // Buffers for the layers that are there now; to be called once before the first `run`.
  void prepare();
  void run(const Call& call);
  std::vector<double> shares() const;  // threads', of the work of calls that are not prompts; 1 in all

 private:
  struct Range {
    int begin, end;
  };
  // Queries that read the same keys.
  struct Readers {
    int count = 0, kv_head = 0, first_run = 0, runs = 0;  // of positions, up to `runs`, those that one of them sees
    int token[kMostQueries], head[kMostQueries];
  };
  // Token numbers: those that one thread embeds and normalises, and those that it multiplies: of a branch, all, the ones
  // that run it or do not, and those whose keys and values are computed.
  struct alignas(64) Lists {
    std::vector<int> own, all, kept, skipped, remembered;
    std::vector<PromptQuery> queries;  // of one head of keys
    double spans, seconds;             // of tokens' gated units that it multiplied in this call, and what it took
  };

  void balance();
  Range share(int64_t count, int thread) const;
  Range split(int count, int thread) const;  // of rows, channels or listed tokens: all, where tokens are shared out
  void list_tokens(int count, int thread);
  void drop_unwanted(const Call& call, std::initializer_list<std::vector<int>*> lists) const;
  void meet();  // unless tokens are shared out
  void work(const Call& call, int thread);
  void copy_row(const Table& table, int row, float* to) const;
  void embed(const Call& call, int thread);
  void enter(const Call& call, const Branch& branch, bool there, int index, int thread);
  void attention(const Call& call, int layer, int thread);
  void mlp(const Call& call, int layer, int thread);
  void place(const Call& call, int layer, int token, int head, bool kept);
  void attend(const Call& call, int layer, const std::vector<int>& tokens, int thread);
  void attend_prompt(const Call& call, int layer, const std::vector<int>& tokens, int thread);
  void read_out(const Call& call, int thread);

  void round(const Activations& a, int token, int begin, int end) const;
  Product shared(const Matrix& m, const Outputs& to, int thread) const;  // the thread's share of it
  void multiply(std::initializer_list<Product> products, const Activations& from, const std::vector<int>& tokens,
                bool gathered = false) const;
  bool goes_own_way(const Matrix& m) const;
  bool gather(const Matrix& m, const Activations& from, const std::vector<int>& tokens) const;
  void finish(const Matrix& m, const Activations& from, const Branch& branch, int thread);
  void glu(const Matrix& gate, const Matrix& up, const std::vector<int>& tokens, int thread);
  void replace_inner(const Surrogate& surrogate, const std::vector<int>& tokens, int thread);
  void replace_outer(const Surrogate& surrogate, const std::vector<int>& tokens, int thread);

  size_t slot(const Call& call, const Layer& layer, int token, int head) const;
  Readers readers(const Call& call, const Layer& layer, const std::vector<int>& tokens, int at, int end) const;
  float* parts(size_t query, int run) const;  // where what a run of positions gives a query goes
  float* floats(size_t count);
  Activations activations(int columns);

  Team team_;
  std::vector<Lists> lists_;
  std::vector<double> cuts_;  // where threads' shares begin and end, from 0 to 1
  std::vector<std::unique_ptr<uint8_t[]>> owned_;
  Cache keys_, values_;
  std::vector<uint8_t> keep_;  // (2 layers, window)
  Activations normed_, mixed_, inner_;
  float *hidden_, *qkv_, *pieces_, *out_, *parts_, *logits_, *row_;
  std::vector<Logit> found_;   // (kLogits, threads, those that each looks for)
  size_t kept_heads_ = 0;      // of a row of the cache, in all layers
  size_t stride_ = 0;          // of `qkv_`
  size_t piece_size_ = 0;      // of a thread's gates, and of what they gate, that `glu` takes at once
  bool codes_ = false, floats_ = false;     // whether layers have weights of codes, of bf16
  bool others_ = false;                     // and of codes that `PromptKernels` have no way for
  const PromptKernels* prompts_ = nullptr;  // where this call goes their way
  bool apart_ = false;                      // and threads share out tokens
};

}  // namespace gateskip
