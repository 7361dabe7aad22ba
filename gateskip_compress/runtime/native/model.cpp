#include "model.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <numeric>

#include "pack.h"

namespace gateskip {
namespace {

// The first position that a token in that layer sees.
int seen_from(const Layer& layer, int position) { return layer.window ? std::max(0, position + 1 - layer.window) : 0; }

int runs_seen(const Layer& layer, int position) {
  return runs_of(position + 1) - seen_from(layer, position) / kRun;
}

// The largest of the logits [begin, end), in order; where there are fewer, none after them.
void largest(const float* logits, int begin, int end, int most, Logit* top) {
  int count = 0;
  for (int i = begin; i < end;) {
    const int next = std::min(i + kChunk, end);
    if (count == most) {  // rarely is one of them among the largest
      const float least = top[count - 1].value;
      int any = 0;
      for (int j = i; j < next; ++j) any |= logits[j] > least ? 1 : 0;
      if (!any) i = next;
    }
    for (; i < next; ++i) {
      const Logit found{logits[i], i};
      if (count == most && !(found < top[count - 1])) continue;
      int place = count < most ? count++ : count - 1;
      for (; place > 0 && found < top[place - 1]; --place) top[place] = top[place - 1];
      top[place] = found;
    }
  }
  std::fill(top + count, top + most, Logit());
}

}  // namespace

Model::Model(const Shape& s, const Kernels& k, int threads)
    : shape(s),
      kernels(k),
      window(kWindow * (k.prompts ? std::min(threads, kShared) : 1)),
      team_(threads),
      lists_(threads),
      cuts_(threads + 1) {
  for (int thread = 0; thread <= threads; ++thread) cuts_[thread] = double(thread) / threads;
}

float* Model::floats(size_t count) {
  owned_.emplace_back(new uint8_t[4 * count + 64]());
  return reinterpret_cast<float*>(at_line(owned_.back().get()));
}

Activations Model::activations(int columns) {
  Activations a;
  a.columns = padded(columns, kChunk);
  a.x = floats(size_t(window) * a.columns);
  if (kernels.prompts && kernels.prompts->split && floats_)
    a.halves = reinterpret_cast<uint16_t*>(floats(window * a.halves_apart() / 2));
  a.q = reinterpret_cast<int8_t*>(floats(size_t(window) * a.columns / 4));
  if (shape.fine) {
    a.fine = reinterpret_cast<int8_t*>(floats(size_t(window) * a.columns / 4));
    a.wide = reinterpret_cast<int16_t*>(floats(size_t(window) * a.columns / 2));
  }
  a.scale = floats(size_t(window) * a.chunks());
  a.sum = floats(size_t(window) * a.chunks());
  return a;
}

void Model::prepare() {
  int most = 0;  // heads of a layer
  for (Layer& layer : layers) {
    layer.heads = layer.q.rows / shape.head_dim, layer.kv_heads = layer.k.rows / shape.head_dim;
    layer.first_head = kept_heads_;
    kept_heads_ += layer.kv_heads;
    most = std::max(most, layer.heads);
    stride_ = std::max(stride_, size_t(layer.heads + 2 * layer.kv_heads) * shape.head_dim);
    const auto look = [&](const Matrix& m) {
      const bool codes = m.data && (m.kind == Kind::int4 || m.kind == Kind::int8);
      codes_ |= codes, others_ |= codes && !(kernels.prompts && kernels.prompts->suits(m, shape.fine));
    };
    for (const Matrix* m : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down})
      look(*m), floats_ |= m->kind == Kind::bf16;
    for (const Branch* branch : {&layer.attention, &layer.mlp, &layer.draft_attention, &layer.draft_mlp})
      look(branch->surrogate.gate), look(branch->surrogate.up), look(branch->surrogate.down);
  }
  normed_ = activations(shape.width);
  mixed_ = activations(most * shape.head_dim);
  inner_ = activations(shape.inner);
  hidden_ = floats(size_t(window) * shape.width);
  qkv_ = floats(window * stride_);
  piece_size_ = std::max(size_t(window) * kSpans * kSpan, size_t(kFew) * padded(shape.inner, kSpan));
  pieces_ = floats(padded(shape.inner, kSpan) + 2 * team_.size() * piece_size_) + padded(shape.inner, kSpan);
  out_ = floats(size_t(window) * shape.width);
  const size_t queries_at_once = std::max(kFew * most, team_.size() * kMostQueries);
  parts_ = floats(queries_at_once * runs_of(shape.context) * Queries::part_size(shape.head_dim));
  logits_ = floats(size_t(kLogits) * shape.vocabulary);
  row_ = floats(size_t(team_.size()) * shape.width);
  found_.resize(size_t(kLogits) * team_.size() * kRescored);
  keep_.resize(2 * layers.size() * window);
  const size_t heads = shape.rows * kept_heads_;
  keys_ = Cache(kernels, shape.element, heads, shape.context, shape.head_dim, kernels.lanes, kKeyGroup);
  values_ = Cache(kernels, shape.element, heads, shape.context, shape.head_dim, 1, shape.head_dim);
  for (Lists& lists : lists_) {
    for (std::vector<int>* list : {&lists.own, &lists.all, &lists.kept, &lists.skipped, &lists.remembered})
      list->reserve(window);
    lists.queries.reserve(kernels.prompts ? size_t(window) * most : 0);
  }
}

void Model::run(const Call& call) {
  prompts_ = call.prompt && call.count >= kPrompt ? kernels.prompts : nullptr;
  apart_ = prompts_ && call.count >= kApart * team_.size();
  team_.run([&](int thread) { work(call, thread); });
  if (!prompts_) balance();
}

// Moves shares towards how fast threads multiplied in this call: cores may differ, or work for others for a while.
void Model::balance() {
  double all = 0;  // spans in a second
  for (const Lists& lists : lists_) {
    if (!(lists.spans > 0 && lists.seconds > 0)) return;
    all += lists.spans / lists.seconds;
  }
  const double even = 1.0 / team_.size();
  double begin = 0, sum = 0;
  for (int thread = 0; thread < team_.size(); ++thread) {
    const double own = lists_[thread].spans / lists_[thread].seconds / all, before = cuts_[thread + 1] - begin;
    begin = cuts_[thread + 1];
    cuts_[thread + 1] = sum += before + kAdapt * (std::clamp(own, even / 2, 2 * even) - before);
  }
  for (double& cut : cuts_) cut /= sum;
}

std::vector<double> Model::shares() const {
  std::vector<double> widths(cuts_.size());
  std::adjacent_difference(cuts_.begin(), cuts_.end(), widths.begin());
  return {widths.begin() + 1, widths.end()};
}

// Equal for prompts that go their own way: their bits depend on who takes what.
Model::Range Model::share(int64_t count, int thread) const {
  const auto at = [&](int part) {
    return static_cast<int>(prompts_ ? count * part / team_.size() : std::llround(double(count) * cuts_[part]));
  };
  return {at(thread), at(thread + 1)};
}

Model::Range Model::split(int count, int thread) const { return apart_ ? Range{0, count} : share(count, thread); }

void Model::meet() {
  if (!apart_) team_.wait();
}

// Threads that share out tokens take parts from both ends: later tokens attend to more.
void Model::list_tokens(int count, int thread) {
  Lists& lists = lists_[thread];
  lists.own.clear();
  lists.spans = lists.seconds = 0;
  const auto add = [&](std::vector<int>& list, Range range) {
    for (int token = range.begin; token < range.end; ++token) list.push_back(token);
  };
  if (apart_) {
    const int parts = 2 * team_.size();
    for (int part : {thread, parts - 1 - thread})
      add(lists.own, {static_cast<int>(int64_t(count) * part / parts), static_cast<int>(int64_t(count) * (part + 1) / parts)});
    lists.all = lists.own;
  } else {
    add(lists.own, share(count, thread));
    lists.all.clear();
    add(lists.all, {0, count});
  }
}

// Tokens whose logits nobody wants end with the last layer's keys and values, unless its decisions are asked for.
void Model::drop_unwanted(const Call& call, std::initializer_list<std::vector<int>*> lists) const {
  if (call.wanted == call.count || call.kept || call.scores) return;
  const int32_t* end = call.want + call.wanted;
  const auto unwanted = [&](int token) { return std::find(call.want, end, token) == end; };
  for (std::vector<int>* list : lists) list->erase(std::remove_if(list->begin(), list->end(), unwanted), list->end());
}

void Model::work(const Call& call, int thread) {
  list_tokens(call.count, thread);
  embed(call, thread);
  for (int layer = 0; layer < static_cast<int>(layers.size()); ++layer) {
    attention(call, layer, thread);
    mlp(call, layer, thread);
  }
  if (apart_) team_.wait();
  read_out(call, thread);
}

// A row of a table, as floats.
void Model::copy_row(const Table& table, int row, float* to) const {
  if (table.codes.data) return unpack_row(table.codes, kernels.lanes, row, to);
  const size_t from = size_t(row) * shape.width;
  if (!table.bf16) {
    std::memcpy(to, static_cast<const float*>(table.data) + from, sizeof(float) * shape.width);
    return;
  }
  for (int i = 0; i < shape.width; ++i) to[i] = from_bf16(static_cast<const uint16_t*>(table.data) + from + i);
}

void Model::embed(const Call& call, int thread) {
  for (int token : lists_[thread].own) {
    float* x = hidden_ + size_t(token) * shape.width;
    copy_row(embedding, call.ids[token], x);
    for (int i = 0; shape.enlarged != 1 && i < shape.width; ++i) x[i] *= shape.enlarged;
  }
}

// Normalises the stream and decides which tokens run the branch, if it is there, each thread for its tokens; then lists
// them.
void Model::enter(const Call& call, const Branch& branch, bool there, int index, int thread) {
  const bool decides = there && call.thresholds && branch.gated;
  uint8_t* keep = keep_.data() + size_t(index) * window;
  for (int token : lists_[thread].own) {
    float* x = normed_.floats(token);
    kernels.norm(hidden_ + size_t(token) * shape.width, branch.norm.data(), shape.width, shape.eps, x);
    round(normed_, token, 0, shape.width);
    keep[token] = there;
    if (decides && branch.follows) keep[token] = keep[token - window];
    if (decides && !branch.follows) {
      const float score = kernels.dot(x, branch.score.data(), shape.width) + branch.bias;
      keep[token] = score > call.thresholds[index] || call.positions[token] == 0;
      if (call.scores) call.scores[size_t(index) * call.count + token] = score;
    }
    if (call.kept) call.kept[size_t(index) * call.count + token] = keep[token];
  }
  meet();
  Lists& lists = lists_[thread];
  lists.kept.clear();
  lists.skipped.clear();
  for (int token : lists.all) (keep[token] ? lists.kept : lists.skipped).push_back(token);
}

void Model::attention(const Call& call, int index, int thread) {
  const Layer& layer = layers[index];
  const Branch& branch = call.draft ? layer.draft_attention : layer.attention;
  Lists& lists = lists_[thread];
  const bool there = layer.q.data, last = index + 1 == static_cast<int>(layers.size());
  if (!there && branch.surrogate.empty()) return;
  enter(call, branch, there, 2 * index, thread);
  lists.remembered = layer.copies ? lists.kept : lists.all;
  if (last) drop_unwanted(call, {&lists.kept, &lists.skipped});
  replace_inner(branch.surrogate, lists.skipped, thread);
  if (there) {
    const int queries = layer.heads * shape.head_dim, others = layer.kv_heads * shape.head_dim;
    const Product q = shared(layer.q, {qkv_, stride_}, thread);
    const Product k = shared(layer.k, {qkv_ + queries, stride_}, thread);
    const Product v = shared(layer.v, {qkv_ + queries + others, stride_}, thread);
    if (lists.kept.size() == lists.remembered.size()) {
      multiply({q, k, v}, normed_, lists.kept);
    } else {
      multiply({q}, normed_, lists.kept);
      multiply({k, v}, normed_, lists.remembered);
    }
    meet();
    const uint8_t* keep = keep_.data() + size_t(2 * index) * window;
    const int heads = layer.heads + layer.kv_heads, all = static_cast<int>(lists.all.size()) * heads;
    // in turn: a head of keys and values takes longer than one of queries
    for (int i = apart_ ? 0 : thread; i < all; i += apart_ ? 1 : team_.size())
      place(call, index, lists.all[i / heads], i % heads, keep[lists.all[i / heads]]);
    if (last) drop_unwanted(call, {&lists.own, &lists.all});
    if (apart_ || !lists.kept.empty()) {  // else nobody reads what was placed before all have met again
      team_.wait();
      prompts_ ? attend_prompt(call, index, lists.kept, thread) : attend(call, index, lists.kept, thread);
    }
  } else {
    meet();
  }
  finish(layer.o, mixed_, branch, thread);
}

void Model::mlp(const Call& call, int index, int thread) {
  const Layer& layer = layers[index];
  const Branch& branch = call.draft ? layer.draft_mlp : layer.mlp;
  const Lists& lists = lists_[thread];
  const bool there = layer.gate.data;
  if (!there && branch.surrogate.empty()) return;
  enter(call, branch, there, 2 * index + 1, thread);
  if (there) glu(layer.gate, layer.up, lists.kept, thread);
  replace_inner(branch.surrogate, lists.skipped, thread);
  meet();
  finish(layer.down, inner_, branch, thread);
}

// A branch's last product, of the tokens that run it, and the surrogate of those that do not, added to the stream.
void Model::finish(const Matrix& m, const Activations& from, const Branch& branch, int thread) {
  const std::vector<int>& kept = lists_[thread].kept;
  if (branch.post.empty()) {
    if (!kept.empty()) multiply({shared(m, {hidden_, size_t(shape.width), true}, thread)}, from, kept);
  } else {
    multiply({shared(m, {out_, size_t(shape.width)}, thread)}, from, kept);
    meet();
    const auto [begin, end] = split(static_cast<int>(kept.size()), thread);
    for (int i = begin; i < end; ++i) {
      float *to = hidden_ + size_t(kept[i]) * shape.width, *y = out_ + size_t(kept[i]) * shape.width;
      kernels.norm(y, branch.post.data(), shape.width, shape.eps, y);
      for (int column = 0; column < shape.width; ++column) to[column] += y[column];
    }
  }
  replace_outer(branch.surrogate, lists_[thread].skipped, thread);
  meet();
}

// Which of the cache's heads one of a token's is.
size_t Model::slot(const Call& call, const Layer& layer, int token, int head) const {
  return call.rows[token] * kept_heads_ + layer.first_head + head;
}

// Finishes one of a token's queries, or puts keys and values of one of the heads that follow these into the cache.
void Model::place(const Call& call, int index, int token, int head, bool kept) {
  const Layer& layer = layers[index];
  const int d = shape.head_dim, position = call.positions[token], kv_head = head - layer.heads;
  float* x = qkv_ + token * stride_ + size_t(head) * d;
  const auto turn = [&](const std::vector<float>& weight) {
    if (!weight.empty()) kernels.norm(x, weight.data(), d, shape.eps, x);
    if (layer.rotation < 0) return;
    const Rotation& rotation = rotations[layer.rotation];
    const size_t at = size_t(position) * shape.rotated;
    kernels.rotate(x, rotation.cos + at, rotation.sin + at, shape.rotated);
  };
  if (kv_head < 0) {
    if (!kept) return;
    turn(layer.q_norm);
    for (int i = 0; i < d; ++i) x[i] *= shape.scale;
    return;
  }
  const size_t to = slot(call, layer, token, kv_head);
  if (layer.copies && !kept) {
    const size_t from = slot(call, layers[index - 1], token, kv_head);
    keys_.copy(from, to, position);
    values_.copy(from, to, position);
    return;
  }
  turn(layer.k_norm);
  keys_.write(to, position, x);
  values_.write(to, position, x + size_t(layer.kv_heads) * d);
}

float* Model::parts(size_t query, int run) const {
  return parts_ + (query * runs_of(shape.context) + run) * Queries::part_size(shape.head_dim);
}

// Queries are numbered in the order of heads that share keys, then tokens. A few from `at` on that read the same keys.
Model::Readers Model::readers(const Call& call, const Layer& layer, const std::vector<int>& tokens, int at,
                              int end) const {
  const int group = layer.heads / layer.kv_heads, of_head = static_cast<int>(tokens.size()) * group;
  Readers found;
  found.kv_head = at / of_head, found.first_run = runs_of(shape.context);
  for (int i = at; i < end && found.count < kMostQueries && i / of_head == found.kv_head; ++i) {
    const int token = tokens[i % of_head / group];
    if (found.count && call.rows[token] != call.rows[found.token[0]]) break;
    found.token[found.count] = token, found.head[found.count++] = found.kv_head * group + i % group;
    found.first_run = std::min(found.first_run, seen_from(layer, call.positions[token]) / kRun);
    found.runs = std::max(found.runs, runs_of(call.positions[token] + 1));
  }
  return found;
}

// What tokens attend to, rounded. Of many tokens, each thread takes a share of the queries; of a few, queries' runs that
// make up its share of the positions that all see.
void Model::attend(const Call& call, int index, const std::vector<int>& tokens, int thread) {
  const Layer& layer = layers[index];
  const int d = shape.head_dim, count = static_cast<int>(tokens.size()), group = layer.heads / layer.kv_heads;
  const bool few = count <= kFew;
  const auto merge = [&](int token, int head, size_t query) {
    const int position = call.positions[token], first = seen_from(layer, position) / kRun;
    kernels.merge(parts(query, first), runs_seen(layer, position), d, mixed_.floats(token) + size_t(head) * d);
  };
  int64_t seen_by_all = 0, counted = 0;
  for (int token : tokens) {
    const int position = call.positions[token];
    seen_by_all += int64_t(layer.heads) * (position + 1 - seen_from(layer, position));
  }
  const Range all{0, count * layer.heads}, queries = few ? all : share(all.end, thread);
  const auto [from_here, to_here] = share(seen_by_all, thread);
  Queries to;
  to.head_dim = d;
  for (int at = queries.begin; at < queries.end;) {
    const Readers now = readers(call, layer, tokens, at, queries.end);
    const size_t from = slot(call, layer, now.token[0], now.kv_head), first = few ? at : thread * kMostQueries;
    for (int run = now.first_run; run < now.runs; ++run) {
      to.keys = keys_.elements(from, run * kRun), to.key_scales = keys_.scales(from, run * kRun);
      to.values = values_.elements(from, run * kRun), to.value_scales = values_.scales(from, run * kRun);
      to.count = 0;
      for (int i = 0; i < now.count; ++i) {
        const int position = call.positions[now.token[i]], from = std::max(0, seen_from(layer, position) - run * kRun),
                  seen = std::min(kRun, position + 1 - run * kRun);
        if (from >= seen) continue;
        const int64_t middle = counted + (seen - from) / 2;
        counted += seen - from;
        if (few && (middle < from_here || middle >= to_here)) continue;
        to.query[to.count] = qkv_ + now.token[i] * stride_ + size_t(now.head[i]) * d;
        to.part[to.count] = parts(first + i, run);
        to.begin[to.count] = from, to.end[to.count++] = seen;
      }
      if (to.count) kernels.attend(to, shape.element);
    }
    for (int i = 0; !few && i < now.count; ++i) merge(now.token[i], now.head[i], first + i);
    at += now.count;
  }
  team_.wait();
  const int step = kSpan / std::gcd(d, kSpan), steps = (layer.heads + step - 1) / step;  // heads of whole spans
  const auto [begin, end] = share(count * steps, thread);
  for (int at = begin; at < end; ++at) {
    const int i = at / steps, first = at % steps * step, last = std::min(first + step, layer.heads);
    for (int head = first; few && head < last; ++head)
      merge(tokens[i], head, (size_t(head / group) * count + i) * group + head % group);
    round(mixed_, tokens[i], first * d, last * d);
  }
  team_.wait();
}

// Each thread takes a share of the queries, those of the same keys at once.
void Model::attend_prompt(const Call& call, int index, const std::vector<int>& tokens, int thread) {
  const Layer& layer = layers[index];
  const int d = shape.head_dim, count = static_cast<int>(tokens.size()), group = layer.heads / layer.kv_heads;
  const Range own = split(count * layer.kv_heads, thread);  // pairs of a token and a head of keys
  std::vector<PromptQuery>& queries = lists_[thread].queries;
  for (int at = own.begin; at < own.end;) {
    const int kv_head = at / count, last = std::min(own.end, (kv_head + 1) * count);
    const size_t from = slot(call, layer, tokens[0], kv_head);
    queries.clear();
    for (; at < last; ++at) {
      const int token = tokens[at - kv_head * count], position = call.positions[token];
      for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
        queries.push_back({qkv_ + token * stride_ + size_t(head) * d, mixed_.floats(token) + size_t(head) * d,
                           seen_from(layer, position), position + 1});
    }
    prompts_->attend({static_cast<int>(queries.size()), queries.data(), keys_.elements(from, 0),
                      values_.elements(from, 0), keys_.scales(from, 0), values_.scales(from, 0), d},
                     shape.element);
  }
  meet();
  const auto [begin, end] = split(count, thread);
  for (int i = begin; i < end; ++i) round(mixed_, tokens[i], 0, layer.heads * d);
  meet();
}

// For the weights that there are; products of codes with a way of their own round for themselves, see `gather`.
void Model::round(const Activations& a, int token, int begin, int end) const {
  if (codes_ && (!prompts_ || others_)) kernels.quantize(a, token, begin, end);
  if (prompts_ && a.halves) prompts_->split(a, token, begin, end);
}

Product Model::shared(const Matrix& m, const Outputs& to, int thread) const {
  const auto [begin, end] = split(blocks(m, kernels.lanes), thread);
  return {&m, begin, end, to};
}

void Model::multiply(std::initializer_list<Product> products, const Activations& from,
                     const std::vector<int>& tokens, bool gathered) const {
  const int count = static_cast<int>(tokens.size());
  const auto own = [&](const Product& product) { return goes_own_way(*product.matrix); };
  if (std::none_of(products.begin(), products.end(), own))
    return kernels.multiply(products.begin(), static_cast<int>(products.size()), from, tokens.data(), count);
  for (const Product& product : products) {
    if (!own(product)) {
      kernels.multiply(&product, 1, from, tokens.data(), count);
      continue;
    }
    if (!gathered) gathered = gather(*product.matrix, from, tokens);
    prompts_->multiply(product, from, tokens.data(), count);
  }
}

// Whether this call has `PromptKernels` for such weights.
bool Model::goes_own_way(const Matrix& m) const {
  return prompts_ && prompts_->suits(m, shape.fine) && (m.kind != Kind::bf16 || floats_);
}

// What products of codes like these read, for several of `multiply`; whether there are any.
bool Model::gather(const Matrix& m, const Activations& from, const std::vector<int>& tokens) const {
  if (m.kind != Kind::int4 || !goes_own_way(m)) return false;
  prompts_->gather(from, m.columns, tokens.data(), static_cast<int>(tokens.size()));
  return true;
}

// Whole spans of channels to each thread, so that it can round them at once; those of many tokens a few at a time, while
// they are in the cache. Without `up`, the gate's own.
void Model::glu(const Matrix& gate, const Matrix& up, const std::vector<int>& tokens, int thread) {
  if (tokens.empty()) return;
  const auto [begin, end] = split(padded(gate.rows, kSpan) / kSpan, thread);
  const int lanes = kernels.lanes, step = lists_[thread].all.size() > kFew ? kSpans : std::max(1, end - begin);
  const size_t stride = size_t(step) * kSpan;
  float* piece = pieces_ + 2 * thread * piece_size_;
  const auto start = std::chrono::steady_clock::now();
  const bool gathered = gather(gate, normed_, tokens) || (up.data && gather(up, normed_, tokens));
  for (int span = begin; span < end; span += step) {
    const int first = span * kSpan, last = std::min({(span + step) * kSpan, end * kSpan, gate.rows});
    const int block = first / lanes, past = (last + lanes - 1) / lanes;
    float *gates = piece - first, *ups = gates + piece_size_;  // as if of whole rows
    if (up.data)
      multiply({{&gate, block, past, {gates, stride}}, {&up, block, past, {ups, stride}}}, normed_, tokens, gathered);
    else
      multiply({{&gate, block, past, {inner_.x, size_t(inner_.columns)}}}, normed_, tokens, gathered);
    for (int token : tokens) {
      if (up.data)
        kernels.glu(gates + token * stride + first, ups + token * stride + first, last - first, shape.activation,
                    inner_.floats(token) + first);
      round(inner_, token, first, last);
    }
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  lists_[thread].seconds += took.count();
  lists_[thread].spans += double(end - begin) * static_cast<double>(tokens.size());
}

void Model::replace_inner(const Surrogate& surrogate, const std::vector<int>& tokens, int thread) {
  if (surrogate.up.data || (surrogate.gate.data && prompts_ && inner_.halves))
    glu(surrogate.gate, surrogate.up, tokens, thread);
  else if (surrogate.gate.data)
    multiply({shared(surrogate.gate, {inner_.x, size_t(inner_.columns)}, thread)}, normed_, tokens);
}

void Model::replace_outer(const Surrogate& surrogate, const std::vector<int>& tokens, int thread) {
  if (surrogate.down.data)
    return multiply({shared(surrogate.down, {hidden_, size_t(shape.width), true}, thread)}, inner_, tokens);
  if (surrogate.offset.empty()) return;
  const auto [begin, end] = split(shape.width, thread);
  for (int token : tokens)
    for (int i = begin; i < end; ++i) hidden_[size_t(token) * shape.width + i] += surrogate.offset[i];
}

// Logits of the wanted tokens, and the largest of each. Where they come from a head that is coarser than its exact rows
// are, the few largest of all are computed again from these, and those decide.
void Model::read_out(const Call& call, int thread) {
  const int size = call.vocabulary, threads = team_.size();
  int tokens[kLogits];
  std::iota(tokens, tokens + kLogits, 0);
  const bool quick = quick_head.data && !call.logits, exact = !quick && !exact_head.data;
  const int most = exact ? 1 : kRescored;
  Logit top[kLogits][kRescored];
  Activations inputs = normed_;
  if (quick) inputs.fine = nullptr;  // its weights err more than 8 bits do
  for (int first = 0; first < call.wanted; first += kLogits) {
    const int count = std::min(kLogits, call.wanted - first);
    const auto [begin, end] = share(count, thread);
    for (int i = begin; i < end; ++i) {
      const float* stream = hidden_ + size_t(call.want[first + i]) * shape.width;
      kernels.norm(stream, norm.data(), shape.width, shape.eps, inputs.floats(i));
      kernels.quantize(inputs, i, 0, shape.width);
    }
    team_.wait();
    float* logits = call.logits ? call.logits + size_t(first) * size : logits_;
    const auto [from, to] = share((size + kernels.lanes - 1) / kernels.lanes, thread);
    const Product product{quick ? &quick_head : &head, from, to, {logits, size_t(size)}};
    kernels.multiply(&product, 1, inputs, tokens, count);
    for (int i = 0; i < count; ++i)
      largest(logits + size_t(i) * size, from * kernels.lanes, std::min(to * kernels.lanes, size), most,
              &found_[(size_t(i) * threads + thread) * most]);
    team_.wait();
    const auto [from_rank, to_rank] = share(exact ? 0 : most, thread);
    for (int i = 0; i < count; ++i) {
      const Logit* found = &found_[size_t(i) * threads * most];
      std::partial_sort_copy(found, found + threads * most, top[i], top[i] + most);
      for (int rank = from_rank; rank < to_rank && top[i][rank].index >= 0; ++rank) {
        float* row = row_ + size_t(thread) * shape.width;
        copy_row(exact_head, top[i][rank].index, row);
        logits[size_t(i) * size + top[i][rank].index] = kernels.dot(inputs.floats(i), row, shape.width);
      }
    }
    if (!exact) team_.wait();
    for (int i = begin; i < end; ++i) {
      const float* row = logits + size_t(i) * size;
      for (int rank = 0; rank < most && top[i][rank].index >= 0; ++rank) top[i][rank].value = row[top[i][rank].index];
      const Logit best = *std::min_element(top[i], top[i] + most);
      call.best[first + i] = best.index;
      if (call.shares) call.shares[first + i] = 1 / kernels.exp_sum(row, size, best.value);
    }
    team_.wait();
  }
}

}  // namespace gateskip
