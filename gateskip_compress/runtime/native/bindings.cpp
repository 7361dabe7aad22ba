// Python's view: packed matrices, a model built of them, and the kernels one by one for tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <mutex>
#include <numeric>
#include <string>

#include "model.h"
#include "pack.h"
#include "passages.h"
#include "sampling.h"

namespace py = pybind11;

namespace gateskip {
namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;
using Ints = py::array_t<int32_t, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;

void check(bool holds, const std::string& message) {
  if (!holds) throw py::value_error(message);
}

const Kernels& kernels_named(const std::string& name) {
  std::string known;
  for (const Kernels* kernels : usable_kernels()) {
    if (kernels->name == name) return *kernels;
    known += known.empty() ? kernels->name : std::string(", ") + kernels->name;
  }
  throw py::value_error("kernels '" + name + "' cannot run here; these can: " + known);
}

Kind kind_named(const std::string& name) {
  if (name == "int4") return Kind::int4;
  if (name == "int8") return Kind::int8;
  if (name == "bf16") return Kind::bf16;
  if (name == "f32") return Kind::f32;
  throw py::value_error("kind '" + name + "' must be int4, int8, bf16 or f32");
}

Element element_named(const std::string& name) {
  if (name == "f32") return Element::f32;
  if (name == "f16") return Element::f16;
  if (name == "int8") return Element::int8;
  throw py::value_error("elements '" + name + "' must be f32, f16 or int8");
}

// A matrix and the arrays that hold its weights.
struct HeldMatrix : Matrix {
  Bytes packed;
  Floats padded_bias;
  int lanes = 0;
};

HeldMatrix hold(const std::string& kernels, const std::string& kind, int rows, int columns, int group, Bytes packed,
                std::optional<Floats> bias) {
  HeldMatrix m;
  m.lanes = kernels_named(kernels).lanes;
  m.kind = kind_named(kind);
  m.rows = rows, m.columns = columns, m.group = group;
  check(rows > 0 && columns > 0, "a matrix needs rows and columns");
  check(group > 0 && group % kChunk == 0, "group " + std::to_string(group) + " must be a multiple of 32");
  const auto bytes = [&] { return blocks(m, m.lanes) * block_bytes(m, m.lanes); };
  const size_t size = bytes();
  m.short_scales = size_t(packed.size()) < size;
  check(size_t(packed.size()) == bytes(), "packed weights have " + std::to_string(packed.size()) +
                                              " bytes, not the " + std::to_string(size) +
                                              " of this shape, kind and kernel");
  m.packed = packed;
  m.data = packed.data();
  if (bias) {
    check(bias->size() == rows, "bias has " + std::to_string(bias->size()) + " values for " + std::to_string(rows) +
                                    " rows");
    m.padded_bias = Floats(blocks(m, m.lanes) * m.lanes);
    std::fill_n(m.padded_bias.mutable_data(), m.padded_bias.size(), 0.0f);
    std::memcpy(m.padded_bias.mutable_data(), bias->data(), sizeof(float) * rows);
    m.bias = m.padded_bias.data();
  }
  return m;
}

Bytes zeros(const Matrix& m, int lanes) {
  Bytes packed(blocks(m, lanes) * block_bytes(m, lanes));
  std::memset(packed.mutable_data(), 0, packed.size());
  return packed;
}

Bytes pack_codes_of(const std::string& kernels, const std::string& kind, Bytes codes, Floats scale, Bytes zero,
                    int group) {
  check(codes.ndim() == 2 && scale.ndim() == 2 && zero.ndim() == 2, "codes, scale and zero are matrices");
  check(group > 0 && group % kChunk == 0, "group " + std::to_string(group) + " must be a multiple of 32");
  Matrix m;
  m.kind = kind_named(kind);
  check(m.kind == Kind::int4 || m.kind == Kind::int8, "codes have kind int4 or int8, not " + kind);
  m.rows = static_cast<int>(codes.shape(0)), m.columns = static_cast<int>(codes.shape(1)), m.group = group;
  for (const py::array& part : {py::array(scale), py::array(zero)})
    check(part.shape(0) == m.rows && part.shape(1) == groups(m),
          "scale and zero need one value for each of " + std::to_string(m.rows) + " rows and " +
              std::to_string(groups(m)) + " groups");
  const int most = m.kind == Kind::int4 ? 15 : 255;
  for (const Bytes& part : {codes, zero})
    check(*std::max_element(part.data(), part.data() + part.size()) <= most,
          "codes and zero points of " + kind + " are at most " + std::to_string(most));
  const int lanes = kernels_named(kernels).lanes;
  m.short_scales = std::all_of(scale.data(), scale.data() + scale.size(),
                               [](float x) { const uint16_t half = to_f16(x); return from_f16(&half) == x; });
  Bytes packed = zeros(m, lanes);
  pack_codes(m, lanes, codes.data(), scale.data(), zero.data(), packed.mutable_data());
  return packed;
}

Bytes pack_floats_of(const std::string& kernels, const std::string& kind, Floats weight) {
  Matrix m;
  m.kind = kind_named(kind);
  check(m.kind == Kind::bf16 || m.kind == Kind::f32, "floats have kind bf16 or f32, not " + kind);
  check(weight.ndim() == 2, "a weight is a matrix");
  m.rows = static_cast<int>(weight.shape(0)), m.columns = static_cast<int>(weight.shape(1));
  const int lanes = kernels_named(kernels).lanes;
  Bytes packed = zeros(m, lanes);
  pack_floats(m, lanes, weight.data(), packed.mutable_data());
  return packed;
}

// Activations of an array (tokens, columns), for tests of single kernels; whole rows may share a scale.
struct OwnActivations : Activations {
  std::vector<float> floats_, scales_, sums_;
  std::vector<int8_t> codes_, fine_;
  std::vector<int16_t> wide_;
  std::vector<uint16_t> halves_;
  std::vector<int> tokens;

  OwnActivations(const Kernels& kernels, const Floats& from, bool with_fine) {
    const int count = static_cast<int>(from.shape(0)), width = static_cast<int>(from.shape(1));
    columns = padded(width, kChunk);
    floats_.resize(size_t(count) * columns);
    codes_.resize(floats_.size());
    scales_.resize(size_t(count) * chunks());
    sums_.resize(scales_.size());
    fine_.resize(with_fine ? floats_.size() : 0);
    wide_.resize(fine_.size());
    if (with_fine) fine = fine_.data(), wide = wide_.data();
    const bool split = kernels.prompts && kernels.prompts->split;
    halves_.resize(split ? count * halves_apart() : 0);
    halves = halves_.data();
    x = floats_.data(), q = codes_.data(), scale = scales_.data(), sum = sums_.data();
    for (int token = 0; token < count; ++token) {
      std::memcpy(floats(token), from.data(token, 0), sizeof(float) * width);
      kernels.quantize(*this, token, 0, width);
      if (split) kernels.prompts->split(*this, token, 0, width);
      tokens.push_back(token);
    }
  }
};

// Of kernels that have them.
const PromptKernels& prompts_of(const Kernels& kernels) {
  check(kernels.prompts, std::string("kernels '") + kernels.name + "' have no way of their own for prompts");
  return *kernels.prompts;
}

Floats multiply(const std::string& kernels, const HeldMatrix& m, Floats x, bool fine, bool prompt) {
  const Kernels& run = kernels_named(kernels);
  check(run.lanes == m.lanes, "the matrix was packed for other kernels");
  check(x.ndim() == 2 && x.shape(1) == m.columns, "x needs " + std::to_string(m.columns) + " columns");
  OwnActivations a(run, x, fine);
  Floats out({x.shape(0), py::ssize_t(m.rows)});
  const Product product{&m, 0, blocks(m, run.lanes), {out.mutable_data(), size_t(m.rows)}};
  const int count = static_cast<int>(a.tokens.size());
  if (prompt) {
    const PromptKernels& prompts = prompts_of(run);
    check(prompts.suits(m, fine),
          "prompts have a way of their own for codes of 4 bits in groups and columns of whole spans times 16 bits, and on "
          "some processors for such times 8 bits, or for bf16");
    if (m.kind == Kind::int4) prompts.gather(a, m.columns, a.tokens.data(), count);
    prompts.multiply(product, a, a.tokens.data(), count);
  } else {
    run.multiply(&product, 1, a, a.tokens.data(), count);
  }
  return out;
}

// Codes, fine codes (zeros without), scales and sums.
py::tuple quantize(const std::string& kernels, Floats x, bool with_fine) {
  OwnActivations a(kernels_named(kernels), x, with_fine);
  py::array_t<int8_t> q({x.shape(0), py::ssize_t(a.columns)}), fine({x.shape(0), py::ssize_t(a.columns)});
  std::memcpy(q.mutable_data(), a.q, a.codes_.size());
  std::fill_n(fine.mutable_data(), fine.size(), int8_t(0));
  std::copy(a.fine_.begin(), a.fine_.end(), fine.mutable_data());
  Floats scale({x.shape(0), py::ssize_t(a.chunks())}), sum({x.shape(0), py::ssize_t(a.chunks())});
  std::memcpy(scale.mutable_data(), a.scale, sizeof(float) * a.scales_.size());
  std::memcpy(sum.mutable_data(), a.sum, sizeof(float) * a.sums_.size());
  return py::make_tuple(q, fine, scale, sum);
}

Floats norm(const std::string& kernels, Floats x, Floats weight, float eps) {
  Floats y(x.size());
  check(x.size() == weight.size(), "x and weight differ in size");
  kernels_named(kernels).norm(x.data(), weight.data(), static_cast<int>(x.size()), eps, y.mutable_data());
  return y;
}

float exp_sum(const std::string& kernels, Floats x, float top) {
  return kernels_named(kernels).exp_sum(x.data(), static_cast<int>(x.size()), top);
}

Limits limits_of(float temperature, int top_k, float top_p, float min_p) {
  check(temperature > 0 && top_k >= 0 && top_p >= 0 && min_p >= 0 && min_p <= 1,
        "a temperature is above 0, top_k and top_p are at least 0, min_p is from 0 to 1");
  return {temperature, top_p, min_p, top_k};
}

void check_chance(double chance) { check(chance >= 0 && chance < 1, "a chance is from 0 to below 1"); }

void check_drawn(int found) {
  check(found >= 0, "no token can be drawn: scores are not numbers, or all of them are -inf");
}

int draw_of(const std::string& kernels, Floats scores, double chance, float temperature, int top_k, float top_p,
            float min_p) {
  check(scores.size() > 0, "a draw takes scores");
  check_chance(chance);
  std::vector<float> own(scores.data(), scores.data() + scores.size());
  const int found = draw(kernels_named(kernels), own, limits_of(temperature, top_k, top_p, min_p), chance);
  check_drawn(found);
  return found;
}

Activation activation_named(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  throw py::value_error("activation '" + name + "' must be silu or gelu");
}

Floats glu(const std::string& kernels, Floats gate, Floats up, const std::string& activation) {
  check(gate.size() == up.size(), "gate and up differ in size");
  Floats y(gate.size());
  kernels_named(kernels).glu(gate.data(), up.data(), static_cast<int>(gate.size()), activation_named(activation),
                             y.mutable_data());
  return y;
}

// Queries (count, head_dim), keys and values (positions, head_dim); the query i sees the positions [begin[i], end[i]).
Floats attend(const std::string& kernels, Floats query, Floats keys, Floats values, Ints begin, Ints end,
              const std::string& element, bool prompt) {
  const Kernels& run = kernels_named(kernels);
  const int count = static_cast<int>(query.shape(0)), d = static_cast<int>(query.shape(1)),
            positions = static_cast<int>(keys.shape(0)), runs = runs_of(positions),
            size = Queries::part_size(d);
  check(prompt || count <= kMostQueries, "at most " + std::to_string(kMostQueries) + " queries");
  check(d % run.lanes == 0, "head width must be a multiple of " + std::to_string(run.lanes));
  for (int i = 0; i < count; ++i)
    check(begin.at(i) >= 0 && begin.at(i) < end.at(i) && end.at(i) <= positions, "begin and end are out of range");
  Cache k(run, element_named(element), 1, positions, d, run.lanes, kKeyGroup),
      v(run, element_named(element), 1, positions, d, 1, d);
  for (int p = 0; p < positions; ++p) k.write(0, p, keys.data(p, 0)), v.write(0, p, values.data(p, 0));
  if (prompt) {
    Floats out({count, d});
    std::vector<PromptQuery> queries;
    for (int i = 0; i < count; ++i)
      queries.push_back({query.data(i, 0), out.mutable_data(i, 0), begin.at(i), end.at(i)});
    prompts_of(run).attend({count, queries.data(), k.elements(0, 0), v.elements(0, 0), k.scales(0, 0), v.scales(0, 0), d},
                           element_named(element));
    return out;
  }
  std::vector<float> parts(size_t(count) * runs * size);
  const auto part = [&](int query, int from) { return parts.data() + (size_t(query) * runs + from / kRun) * size; };
  Floats out({count, d});
  Queries to;
  to.head_dim = d;
  for (int from = 0; from < positions; from += kRun) {
    to.keys = k.elements(0, from), to.key_scales = k.scales(0, from);
    to.values = v.elements(0, from), to.value_scales = v.scales(0, from);
    to.count = 0;
    for (int i = 0; i < count; ++i) {
      const int first = std::max(0, begin.at(i) - from), last = std::min(end.at(i) - from, kRun);
      if (first >= last) continue;
      to.query[to.count] = query.data(i, 0), to.part[to.count] = part(i, from);
      to.begin[to.count] = first, to.end[to.count++] = last;
    }
    if (to.count) run.attend(to, element_named(element));
  }
  for (int i = 0; i < count; ++i)
    run.merge(part(i, begin.at(i)), runs_of(end.at(i)) - begin.at(i) / kRun, d, out.mutable_data(i, 0));
  return out;
}

// Bytes per second of `threads` threads reading an array of their own size again and again; the best of `runs`.
double read_bandwidth(int threads, int megabytes, int runs) {
  const size_t words = size_t(megabytes) * (1 << 20) / 8 / threads;
  std::vector<std::unique_ptr<uint64_t, decltype(&std::free)>> parts;
  for (int thread = 0; thread < threads; ++thread) {
    parts.emplace_back(static_cast<uint64_t*>(gateskip::zeros(words * 8)), &std::free);
    std::fill_n(parts.back().get(), words, 1);
  }
  std::vector<uint64_t> sums(threads);
  Team team(threads);
  double best = 0;
  py::gil_scoped_release release;
  for (int run = 0; run < runs; ++run) {
    const auto start = std::chrono::steady_clock::now();
    team.run([&](int thread) {
      uint64_t sum[8] = {};
      const uint64_t* at = parts[thread].get();
      for (size_t i = 0; i + 8 <= words; i += 8)
        for (int j = 0; j < 8; ++j) sum[j] += at[i + j];
      for (uint64_t part : sum) sums[thread] += part;
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, double(words * 8 * threads) / seconds.count());
  }
  return best;
}

struct HeldModel {
  Model model;
  std::vector<py::object> held;  // arrays that the model only points to
  std::vector<float> scores;     // of a pass whose tokens are drawn
  std::mutex busy;

  HeldModel(const Shape& shape, const std::string& kernels, int threads) : model(shape, kernels_named(kernels), threads) {}

  // Finishes a model whose layers are set. Tables (vocabulary, width) are float, bf16 as 16-bit integers, or matrices of
  // codes.
  void finish(std::vector<Layer> layers, std::vector<float> norm, const HeldMatrix& head, py::object quick_head,
              py::object embedding, py::object exact_head, std::vector<std::pair<Floats, Floats>> rotations,
              py::object owners) {
    const Shape& s = model.shape;
    for (const auto& [cos, sin] : rotations) {
      check(cos.size() == py::ssize_t(s.context) * s.rotated && sin.size() == cos.size(), "cos and sin do not fit");
      model.rotations.push_back({cos.data(), sin.data()});
    }
    for (size_t i = 0; i < layers.size(); ++i) {
      check(layers[i].rotation < static_cast<int>(rotations.size()), "a layer names rotary positions that are not there");
      check(!layers[i].copies || (i > 0 && layers[i - 1].k.rows == layers[i].k.rows),
            "a layer copies from one that has other keys");
    }
    check(head.rows == s.vocabulary && head.columns == s.width, "the head's shape does not fit");
    model.layers = std::move(layers);
    model.norm = std::move(norm);
    model.head = head;
    if (!quick_head.is_none()) {
      model.quick_head = quick_head.cast<const HeldMatrix&>();
      check(model.quick_head.rows == s.vocabulary && model.quick_head.columns == s.width,
            "the quick head's shape does not fit");
      check(!exact_head.is_none(), "a quick head needs exact rows");
    }
    model.embedding = either(embedding);
    if (!exact_head.is_none()) model.exact_head = either(exact_head);
    held = {embedding, exact_head, quick_head, py::cast(rotations), py::cast(head), owners};
    model.prepare();
  }

  Table either(const py::object& rows) const {
    return py::isinstance<HeldMatrix>(rows) ? coded(rows.cast<const HeldMatrix&>()) : table(rows.cast<py::array>());
  }

  Table coded(const HeldMatrix& rows) const {
    check(rows.rows >= model.shape.vocabulary && rows.columns == model.shape.width, "a table's shape does not fit");
    check(rows.kind == Kind::int4 || rows.kind == Kind::int8, "a table of codes has 4 or 8 bits");
    check(rows.lanes == model.kernels.lanes, "a table was packed for other kernels");
    return {nullptr, false, rows};
  }

  Table table(const py::array& rows) const {
    check(rows.ndim() == 2 && rows.shape(0) >= model.shape.vocabulary && rows.shape(1) == model.shape.width,
          "a table's shape does not fit");
    check(rows.itemsize() == 2 || rows.itemsize() == 4, "a table has elements of 2 or 4 bytes");
    return {rows.data(), rows.itemsize() == 2, {}};
  }

  // Runs tokens; returns the best next token of each wanted one, and what was asked for besides, or None.
  py::tuple run(Ints ids, Ints rows, Ints positions, std::optional<Floats> thresholds, Ints want, bool with_logits,
                bool with_decisions, bool with_shares, bool draft, bool prompt, int vocabulary) {
    Call call = checked(ids, rows, positions, thresholds);
    within(want, call.count, "wanted token");
    check(want.size() <= call.count, "more tokens are wanted than there are");
    check(!prompt || std::count(call.rows, call.rows + call.count, *call.rows) == call.count, "a prompt has one row");
    call.draft = draft, call.prompt = prompt, call.wanted = static_cast<int>(want.size()), call.want = want.data();
    const int size = model.shape.vocabulary;
    check(vocabulary == size || (vocabulary > 0 && vocabulary < size && vocabulary % kChunk == 0),
          "a part of the vocabulary is whole chunks of it");
    call.vocabulary = vocabulary;
    Ints best(want.size());
    call.best = best.mutable_data();
    py::object logits = py::none(), kept = py::none(), scores = py::none(), shares = py::none();
    if (with_logits) {
      Floats all({want.size(), py::ssize_t(vocabulary)});
      call.logits = all.mutable_data();
      logits = all;
    }
    if (with_decisions) {
      const py::ssize_t branches = 2 * model.layers.size();
      Bytes keep({branches, ids.size()});
      Floats score({branches, ids.size()});
      std::fill_n(keep.mutable_data(), keep.size(), uint8_t(0));
      std::fill_n(score.mutable_data(), score.size(), NAN);
      call.kept = keep.mutable_data(), call.scores = score.mutable_data();
      kept = keep, scores = score;
    }
    if (with_shares) {
      Floats all(want.size());
      call.shares = all.mutable_data();
      shares = all;
    }
    at_work([&] { model.run(call); });
    return py::make_tuple(best, logits, kept, scores, shares);
  }

  // Decodes: runs a token of each of several rows, then the best ones after these, and so on; at most `steps` times, and
  // no further than where a row comes to one of `ends`. Returns the best tokens, (steps, rows).
  Ints follow(Ints ids, Ints rows, Ints positions, std::optional<Floats> thresholds, int steps, Ints ends) {
    Call call = checked(ids, rows, positions, thresholds);
    const int count = call.count;
    for (int i = 0; i < count; ++i)
      check(steps >= 1 && call.positions[i] + steps <= model.shape.context, "steps do not fit into the cache");
    std::vector<int32_t> places(call.positions, call.positions + count), want(count), found;
    for (int i = 0; i < count; ++i) want[i] = i;
    found.reserve(size_t(steps) * count);
    call.positions = places.data(), call.want = want.data(), call.wanted = count;
    call.vocabulary = model.shape.vocabulary;
    at_work([&] {
      for (bool ended = false; !ended && found.size() < size_t(steps) * count;) {
        found.resize(found.size() + count);
        call.best = found.data() + found.size() - count;
        model.run(call);
        call.ids = call.best;
        for (int i = 0; i < count; ++i) {
          ++places[i];
          ended |= std::count(ends.data(), ends.data() + ends.size(), call.best[i]) > 0;
        }
      }
    });
    Ints out({py::ssize_t(found.size()) / count, py::ssize_t(count)});
    std::copy(found.begin(), found.end(), out.mutable_data());
    return out;
  }

  // Decodes a row whose text, all but its last token, is in the cache: takes the best tokens, or draws them by `chances`,
  // one for each that may come. Where n of the text's last tokens are found again, it guesses that `guesses[n]` of what
  // followed them follow here too, and verifies these in the same pass. It goes on until `most` tokens came, time is up,
  // one of `ends` came, or nothing is to be guessed, unless it may go on `plainly`. Returns the tokens; how many each
  // pass found, guessed, and kept of these; and each one's seconds.
  py::tuple speculate(Ints text, int row, std::optional<Floats> thresholds, Ints guesses, bool plainly, int most,
                      double seconds, Ints ends, std::optional<Doubles> chances, float temperature, int top_k,
                      float top_p, float min_p) {
    const int longest = static_cast<int>(guesses.size()) - 1, past = static_cast<int>(text.size()) + most;
    check(text.size() >= 1 && longest >= 0, "there is no text, or no number of guesses");
    within(text, model.shape.vocabulary, "token id");
    within(guesses, model.window, "a number of guesses");
    check(row >= 0 && row < model.shape.rows, "there is no row " + std::to_string(row));
    check(most >= 1 && past - 1 <= model.shape.context, "steps do not fit into the cache");
    check(!chances || chances->size() == most, "there is a chance for each token that may come");
    for (py::ssize_t i = 0; chances && i < chances->size(); ++i) check_chance(chances->at(i));
    const Limits limits = limits_of(temperature, top_k, top_p, min_p);
    const int window = 1 + *std::max_element(guesses.data(), guesses.data() + guesses.size());
    std::vector<int32_t> whole(text.data(), text.data() + text.size()), ids(window), rows(window, row), places(window),
        want(window), best(window), passes;
    std::vector<double> took;
    whole.reserve(past), passes.reserve(3 * size_t(most)), took.reserve(most);
    std::iota(want.begin(), want.end(), 0);
    Call call;
    turn(call, thresholds);
    call.ids = ids.data(), call.rows = rows.data(), call.positions = places.data(), call.want = want.data();
    call.best = best.data(), call.vocabulary = model.shape.vocabulary;
    if (chances) scores.resize(size_t(window) * call.vocabulary), call.logits = scores.data();
    std::vector<float> own;  // scores
    int chosen = 0;
    const auto choose = [&](int place, int token) {  // a pass's token that may come after so many
      if (!chances) return best[place];
      const float* from = call.logits + size_t(place) * call.vocabulary;
      own.assign(from, from + call.vocabulary);
      return draw(model.kernels, own, limits, chances->data()[token + place]);
    };
    at_work([&] {
      const auto now = [] { return std::chrono::steady_clock::now(); };
      const auto between = [](auto from, auto to) { return std::chrono::duration<double>(to - from).count(); };
      auto began = now(), last = began;
      for (bool ended = false; !ended && static_cast<int>(whole.size()) < past && between(began, last) < seconds;) {
        const int length = static_cast<int>(whole.size());
        const Passage passage = look_up(whole, longest);
        const int guessed = std::min(guesses.data()[passage.found], past - length - 1);
        if (!guessed && !plainly) break;
        ids[0] = whole.back();
        for (int i = 0; i < guessed; ++i) ids[i + 1] = whole[passage.next + i % (length - passage.next)];
        std::iota(places.begin(), places.end(), length - 1);
        call.count = call.wanted = guessed + 1;
        model.run(call);
        int stand = 0;
        const auto next = [&] { return chosen = best[stand] = choose(stand, length - static_cast<int>(text.size())); };
        while (next() >= 0 && stand < guessed && chosen == ids[stand + 1]) ++stand;
        if (chosen < 0) break;
        whole.insert(whole.end(), best.begin(), best.begin() + stand + 1);
        for (int i = 0; i <= stand; ++i) ended |= std::count(ends.data(), ends.data() + ends.size(), best[i]) > 0;
        passes.insert(passes.end(), {passage.found, guessed, stand});
        const auto before = last;
        last = now();
        took.push_back(between(before, last));
      }
    });
    check_drawn(chosen);
    Ints tokens(py::ssize_t(whole.size()) - text.size()), told({py::ssize_t(took.size()), py::ssize_t(3)});
    std::copy(whole.begin() + text.size(), whole.end(), tokens.mutable_data());
    std::copy(passes.begin(), passes.end(), told.mutable_data());
    return py::make_tuple(tokens, told, py::array_t<double>(py::ssize_t(took.size()), took.data()));
  }

 private:
  static void within(const Ints& values, int end, const char* what) {
    for (py::ssize_t i = 0; i < values.size(); ++i)
      check(values.at(i) >= 0 && values.at(i) < end,
            std::string(what) + " " + std::to_string(values.at(i)) + " must be from 0 to " + std::to_string(end - 1));
  }

  Call checked(const Ints& ids, const Ints& rows, const Ints& positions, const std::optional<Floats>& thresholds) {
    Call call;
    call.count = static_cast<int>(ids.size());
    check(call.count >= 1 && call.count <= model.window,
          "a call takes 1 to " + std::to_string(model.window) + " tokens, not " + std::to_string(call.count));
    check(rows.size() == call.count && positions.size() == call.count, "ids, rows and positions differ in length");
    within(ids, model.shape.vocabulary, "token id");
    within(rows, model.shape.rows, "row");
    within(positions, model.shape.context, "position");
    call.ids = ids.data(), call.rows = rows.data(), call.positions = positions.data();
    turn(call, thresholds);
    return call;
  }

  void turn(Call& call, const std::optional<Floats>& thresholds) {
    if (!thresholds) return;
    check(thresholds->size() == py::ssize_t(2 * model.layers.size()), "thresholds need two values a layer");
    call.thresholds = thresholds->data();
  }

  template <class Work>
  void at_work(Work work) {
    std::unique_lock<std::mutex> lock(busy, std::try_to_lock);
    if (!lock) throw std::runtime_error("this session is at work in another thread; give each thread its own");
    py::gil_scoped_release release;
    work();
  }
};

}  // namespace
}  // namespace gateskip

PYBIND11_MODULE(_native, m) {
  using namespace gateskip;
  m.attr("CHUNK") = kChunk;
  m.attr("WINDOW") = kWindow;  // tokens that any model's call takes
  m.attr("COMPILER") = __VERSION__;
  m.def("kernels", [] {
    std::vector<std::pair<std::string, int>> found;
    for (const Kernels* kernels : usable_kernels()) found.emplace_back(kernels->name, kernels->lanes);
    return found;
  });
  m.def("pack_codes", &pack_codes_of);
  m.def("pack_floats", &pack_floats_of);
  m.def(
      "prompt_kernels",
      [](const std::string& kind, bool fine) {
        Matrix m{kind_named(kind), 1, kSpan, kSpan};
        std::vector<std::string> found;
        for (const Kernels* kernels : usable_kernels())
          if (kernels->prompts && kernels->prompts->suits(m, fine)) found.emplace_back(kernels->name);
        return found;
      },
      py::arg("kind") = "int4", py::arg("fine") = true);
  m.def("multiply", &multiply, py::arg("kernels"), py::arg("matrix"), py::arg("x"), py::arg("fine"),
        py::arg("prompt") = false);
  m.def("quantize", &quantize, py::arg("kernels"), py::arg("x"), py::arg("fine"));
  m.def("norm", &norm);
  m.def("exp_sum", &exp_sum);
  m.def("draw", &draw_of, py::arg("kernels"), py::arg("scores"), py::arg("chance"), py::arg("temperature") = 1,
        py::arg("top_k") = 0, py::arg("top_p") = 1, py::arg("min_p") = 0);
  m.def("glu", &glu);
  m.def("attend", &attend, py::arg("kernels"), py::arg("query"), py::arg("keys"), py::arg("values"),
        py::arg("begin"), py::arg("end"), py::arg("element"), py::arg("prompt") = false);
  m.def("read_bandwidth", &read_bandwidth);

  py::class_<Matrix>(m, "Matrix");
  py::class_<HeldMatrix, Matrix>(m, "HeldMatrix")
      .def(py::init(&hold), py::arg("kernels"), py::arg("kind"), py::arg("rows"), py::arg("columns"),
           py::arg("group"), py::arg("packed"), py::arg("bias") = py::none())
      .def_property_readonly("coded", [](const HeldMatrix& m) { return m.kind == Kind::int4 || m.kind == Kind::int8; })
      .def_property_readonly("nbytes", [](const HeldMatrix& m) { return m.packed.nbytes(); })
      .def_readonly("rows", &HeldMatrix::rows)
      .def_readonly("columns", &HeldMatrix::columns);
  py::class_<Surrogate>(m, "Surrogate")
      .def(py::init<>())
      .def_readwrite("gate", &Surrogate::gate)
      .def_readwrite("up", &Surrogate::up)
      .def_readwrite("down", &Surrogate::down)
      .def_readwrite("offset", &Surrogate::offset);
  py::class_<Branch>(m, "Branch")
      .def(py::init<>())
      .def_readwrite("norm", &Branch::norm)
      .def_readwrite("post", &Branch::post)
      .def_readwrite("gated", &Branch::gated)
      .def_readwrite("follows", &Branch::follows)
      .def_readwrite("score", &Branch::score)
      .def_readwrite("bias", &Branch::bias)
      .def_readwrite("surrogate", &Branch::surrogate);
  py::class_<Layer>(m, "Layer")
      .def(py::init<>())
      .def_readwrite("attention", &Layer::attention)
      .def_readwrite("mlp", &Layer::mlp)
      .def_readwrite("draft_attention", &Layer::draft_attention)
      .def_readwrite("draft_mlp", &Layer::draft_mlp)
      .def_readwrite("q", &Layer::q)
      .def_readwrite("k", &Layer::k)
      .def_readwrite("v", &Layer::v)
      .def_readwrite("o", &Layer::o)
      .def_readwrite("gate", &Layer::gate)
      .def_readwrite("up", &Layer::up)
      .def_readwrite("down", &Layer::down)
      .def_readwrite("q_norm", &Layer::q_norm)
      .def_readwrite("k_norm", &Layer::k_norm)
      .def_readwrite("rotation", &Layer::rotation)
      .def_readwrite("window", &Layer::window)
      .def_readwrite("copies", &Layer::copies);
  py::class_<Shape>(m, "Shape")
      .def(py::init<>())
      .def_readwrite("width", &Shape::width)
      .def_readwrite("head_dim", &Shape::head_dim)
      .def_readwrite("inner", &Shape::inner)
      .def_readwrite("vocabulary", &Shape::vocabulary)
      .def_readwrite("rows", &Shape::rows)
      .def_readwrite("context", &Shape::context)
      .def_readwrite("rotated", &Shape::rotated)
      .def_readwrite("eps", &Shape::eps)
      .def_readwrite("scale", &Shape::scale)
      .def_readwrite("enlarged", &Shape::enlarged)
      .def_property("activation", nullptr,
                    [](Shape& shape, const std::string& name) { shape.activation = activation_named(name); })
      .def_property("element", nullptr, [](Shape& shape, const std::string& name) { shape.element = element_named(name); })
      .def_readwrite("fine", &Shape::fine);
  py::class_<HeldModel>(m, "Model")
      .def(py::init<const Shape&, const std::string&, int>())
      .def_property_readonly("window", [](const HeldModel& held) { return held.model.window; })  // of a prompt
      .def_property_readonly("shares", [](const HeldModel& held) { return held.model.shares(); })
      .def("finish", &HeldModel::finish)
      .def("run", &HeldModel::run)
      .def("follow", &HeldModel::follow)
      .def("speculate", &HeldModel::speculate, py::arg("text"), py::arg("row"), py::arg("thresholds"), py::arg("guesses"),
           py::arg("plainly"), py::arg("most"), py::arg("seconds"), py::arg("ends"), py::arg("chances") = py::none(),
           py::arg("temperature") = 1, py::arg("top_k") = 0, py::arg("top_p") = 1, py::arg("min_p") = 0);
}
