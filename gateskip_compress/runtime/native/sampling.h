// Tokens drawn after their scores were divided by a temperature, from those that top-k, top-p (arXiv 1904.09751) and
// min-p (arXiv 2407.01082) leave, each of what the one before it leaves: what transformers' processors come to, without
// sorting the vocabulary.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "kernels.h"

namespace gateskip {

// These change nothing.
struct Limits {
  float temperature = 1, top_p = 1, min_p = 0;
  int top_k = 0;
};

struct Candidate {
  int place;
  float weight;  // of the softmax, the largest score's being 1
};

// each(place) of scores that reach a bound, which it may raise; most of them, 32 at a time, do not.
template <class Each>
inline void each_from(const std::vector<float>& scores, const float& bound, Each each) {
  const int count = static_cast<int>(scores.size());
  for (int i = 0; i < count; i += kChunk) {
    const float *some = scores.data() + i, least = bound;
    const int own = std::min(kChunk, count - i);
    int any = 0;
    for (int j = 0; j < own; ++j) any |= some[j] >= least ? 1 : 0;
    for (int j = 0; any && j < own; ++j)
      if (some[j] >= bound) each(i + j);
  }
}

// The kth largest of more scores.
inline float kth_largest(const std::vector<float>& scores, size_t k) {
  float bound = -INFINITY;
  std::vector<float> most;
  const auto trim = [&] {
    std::nth_element(most.begin(), most.begin() + k - 1, most.end(), std::greater<float>());
    most.resize(k);
    bound = most.back();
  };
  each_from(scores, bound, [&](int place) {
    most.push_back(scores[place]);
    if (most.size() >= 4 * k) trim();
  });
  trim();
  return bound;
}

// A place, by a number from 0 to below 1; -1 where scores do not say.
inline int draw(const Kernels& kernels, std::vector<float>& scores, const Limits& limits, double chance) {
  const int count = static_cast<int>(scores.size());
  if (limits.temperature != 1)
    for (float& x : scores) x /= limits.temperature;
  const bool by_k = limits.top_k > 0 && limits.top_k < count;
  if (!by_k && limits.top_p >= 1 && limits.min_p <= 0) return kernels.draw(scores.data(), count, chance);
  float top = -INFINITY;
  int undefined = 0;
  for (float x : scores) undefined |= x != x ? 1 : 0;
  each_from(scores, top, [&](int place) { top = scores[place]; });
  if (undefined || !std::isfinite(top)) return -1;
  std::vector<Candidate> left;
  double sum = 0;
  const auto take = [&](float bound) {  // all from a bound on
    left.clear(), sum = 0;
    each_from(scores, bound, [&](int place) {
      left.push_back({place, std::exp(scores[place] - top)});
      sum += static_cast<double>(left.back().weight);
    });
  };
  if (by_k)
    take(kth_largest(scores, limits.top_k));
  else if (limits.top_p >= 1)
    take(top + std::log(limits.min_p) - 1e-3f);
  float least = limits.min_p;
  if (limits.top_p < 1) {
    const double wanted = limits.top_p * (by_k ? sum : static_cast<double>(kernels.exp_sum(scores.data(), count, top)));
    constexpr float deepest = 128;  // below the smallest weight
    for (float depth = 4; !by_k && (depth == 4 || (sum < wanted && depth <= deepest)); depth *= 1.5f) take(top - depth);
    std::vector<float> weights;
    for (const Candidate& one : left) weights.push_back(one.weight);
    std::sort(weights.begin(), weights.end(), std::greater<float>());
    double before = static_cast<double>(weights[0]);
    size_t kept = 1;
    while (kept < weights.size() && before < wanted) before += static_cast<double>(weights[kept++]);
    least = std::max(least, weights[kept - 1]);  // who weighs as much as the last one stays
  }
  const auto falls = [&](const Candidate& one) { return one.weight < least || !(one.weight > 0); };
  left.erase(std::remove_if(left.begin(), left.end(), falls), left.end());
  sum = 0;
  for (const Candidate& one : left) sum += static_cast<double>(one.weight);
  double below = 0;
  for (const Candidate& one : left) {
    below += static_cast<double>(one.weight);
    if (below > chance * sum) return one.place;
  }
  return left.back().place;  // should rounding leave the chance above all sums; the largest is always left
}

}  // namespace gateskip
