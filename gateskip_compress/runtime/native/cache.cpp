#include "cache.h"

#include <algorithm>
#include <cmath>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gateskip {

// In pages of 4 KB, decoding, which reads all of a cache at every token, would have to look up as many addresses.
void* zeros(size_t bytes) {
  void* found = std::calloc(bytes, 1);
  if (!found) throw std::bad_alloc();
#ifdef __linux__
  constexpr uintptr_t kHuge = 1 << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(found), end = begin + bytes;
  const uintptr_t aligned = (begin + kHuge - 1) / kHuge * kHuge;
  if (aligned < end) madvise(reinterpret_cast<void*>(aligned), end - aligned, MADV_HUGEPAGE);
#endif
  return found;
}

Cache::Cache(const Kernels& kernels, Element element, size_t heads, int context, int head_dim, int step, int group)
    : kernels_(&kernels),
      element_(element),
      positions_(padded(context, kMostLanes)),
      head_dim_(head_dim),
      size_(element == Element::f32 ? 4 : element == Element::f16 ? 2 : 1),
      step_(step),
      group_(group),
      groups_((head_dim + group - 1) / group) {
  data_.reset(static_cast<uint8_t*>(zeros(heads * positions_ * head_dim_ * size_)));
  const size_t scales = element == Element::int8 ? heads * positions_ * groups_ : 0;
  if (scales) scales_.reset(static_cast<float*>(zeros(scales * sizeof(float))));
}

void Cache::write(size_t head, int position, const float* values) {
  const auto each = [&](auto* to, auto convert) {
    for (size_t i = 0; i < head_dim_; ++i) to[i * step_] = convert(values[i]);
  };
  if (element_ == Element::f32) return each(first<float>(head, position), [](float x) { return x; });
  if (element_ == Element::f16) {
    uint16_t halves[kMostLanes], *to = first<uint16_t>(head, position);
    for (size_t i = 0; i < head_dim_; i += kMostLanes) {
      const size_t count = std::min(head_dim_ - i, size_t(kMostLanes));
      kernels_->halve(values + i, static_cast<int>(count), step_ == 1 ? to + i : halves);
      for (size_t j = 0; step_ != 1 && j < count; ++j) to[(i + j) * step_] = halves[j];
    }
    return;
  }
  int8_t* to = first<int8_t>(head, position);
  float* scale = first_scale(head, position);
  for (size_t begin = 0; begin < head_dim_; begin += group_, scale += step_) {
    const size_t end = std::min(begin + group_, head_dim_);
    float most = 0, poison = 0;
    for (size_t i = begin; i < end; ++i) most = std::max(most, std::fabs(values[i])), poison += values[i] * 0;
    *scale = most / 127 + poison;
    const float back = most > 0 ? 127 / most : 0;
    for (size_t i = begin; i < end; ++i)
      // the smallest numbers make `back` infinite: the bounds hold what that throws out of range
      to[i * step_] = static_cast<int8_t>(std::nearbyint(std::max(-127.0f, std::min(127.0f, values[i] * back))));
  }
}

void Cache::copy(size_t from, size_t to, int position) {
  const auto each = [&](auto* source, auto* target) {
    for (size_t i = 0; i < head_dim_; ++i) target[i * step_] = source[i * step_];
  };
  switch (element_) {
    case Element::f32: return each(first<float>(from, position), first<float>(to, position));
    case Element::f16: return each(first<uint16_t>(from, position), first<uint16_t>(to, position));
    case Element::int8: break;
  }
  const float* scales = first_scale(from, position);
  float* own = first_scale(to, position);
  for (int group = 0; group < groups_; ++group) own[group * step_] = scales[group * step_];
  each(first<int8_t>(from, position), first<int8_t>(to, position));
}

}  // namespace gateskip
