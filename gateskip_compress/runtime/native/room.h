// Memory that grows and stays. Included before a target is set: the linker may give what it instantiates to anyone.
#pragma once

#include <memory>

#include "kernels.h"

namespace gateskip {

template <class T>
class Room {
 public:
  T* of(size_t count) {
    if (count > size_) {
      held_.reset(new uint8_t[count * sizeof(T) + 64]);
      size_ = count;
    }
    return reinterpret_cast<T*>(at_line(held_.get()));
  }

 private:
  std::unique_ptr<uint8_t[]> held_;
  size_t size_ = 0;
};

}  // namespace gateskip
