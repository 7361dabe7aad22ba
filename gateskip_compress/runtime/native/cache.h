// Keys, or values, of every position seen: written position by position, read by `Kernels::attend`.
#pragma once

#include <cstdlib>
#include <memory>

#include "kernels.h"

namespace gateskip {

// Zeros whose pages come when they are written, huge ones where the system gives such; for std::free.
void* zeros(size_t bytes);

// Elements of one head's positions lie as `Queries` says: keys in blocks of `step` positions, values with a step of 1.
// In 8 bits, `group` channels of a position have a scale of their own, their largest element's 127th part.
class Cache {
 public:
  Cache() = default;
  Cache(const Kernels& kernels, Element element, size_t heads, int context, int head_dim, int step, int group);

  void write(size_t head, int position, const float* values);
  void copy(size_t from, size_t to, int position);  // one head's position to another's

  // From a position on, the first of a block.
  const void* elements(size_t head, int position) const {
    return data_.get() + (head * positions_ + position) * head_dim_ * size_;
  }
  const float* scales(size_t head, int position) const {
    return scales_ ? scales_.get() + (head * positions_ + position) * groups_ : nullptr;
  }

 private:
  template <class T>
  T* first(size_t head, int position) const {
    const size_t in_block = size_t(position / step_) * head_dim_ * step_ + position % step_;
    return reinterpret_cast<T*>(data_.get()) + head * positions_ * head_dim_ + in_block;
  }

  // Of the position's first group; the next is `step` further.
  float* first_scale(size_t head, int position) const {
    return scales_.get() + (head * positions_ + position / step_ * step_) * groups_ + position % step_;
  }

  const Kernels* kernels_ = nullptr;
  Element element_ = Element::f16;
  size_t positions_ = 0, head_dim_ = 0, size_ = 0;
  int step_ = 1, group_ = 0, groups_ = 0;
  std::unique_ptr<uint8_t, void (*)(void*)> data_{nullptr, std::free};  // zeros: pages come when they are written
  std::unique_ptr<float, void (*)(void*)> scales_{nullptr, std::free};
};

}  // namespace gateskip
