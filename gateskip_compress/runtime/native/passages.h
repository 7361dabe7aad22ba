// Passages of a text that are found again, as `speculation/lookup.py` finds them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace gateskip {

// How many of a text's last tokens stood there before, 0 where none did, and where what followed them begins.
struct Passage {
  int found = 0, next = 0;
};

// The longest such passage of at most `longest` tokens, at the latest place.
inline Passage look_up(const std::vector<int32_t>& text, int longest) {
  Passage best;
  const int end = static_cast<int>(text.size()) - 1;
  for (int at = end - 1; at >= 0 && best.found < longest; --at) {
    const int most = std::min(longest, at + 1);
    int found = 0;
    while (found < most && text[at - found] == text[end - found]) ++found;
    if (found > best.found) best = {found, at + 1};
  }
  return best;
}

}  // namespace gateskip
