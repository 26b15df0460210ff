// Room on the heap.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace {

template <typename T>
using Buffer = std::unique_ptr<T[], decltype(&std::free)>;

// Room for so many; null if there is none.
template <typename T>
Buffer<T> make_buffer(int64_t count) {
    return {static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)), std::free};
}

}  // namespace
