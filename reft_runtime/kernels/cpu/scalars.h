// Numbers of float32 and bfloat16, and an exponential that vectorises.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t LANES = 16;      // floats that are computed at once where a vector is that wide
constexpr int64_t SERIAL = 16384;  // elements up to which one thread is faster than several

struct bfloat16 {
    uint16_t bits;
};

inline float load(float x) { return x; }

inline float load(bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline void store(float& to, float value) { to = value; }

inline void store(bfloat16& to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // Round to nearest even; a NaN stays one.
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

constexpr float LEAST_EXPONENT = -87.33654f;  // exp is 0 below

// exp by range reduction and a polynomial, within 2 units in the last place. It vectorises, which
// std::exp does not. NaN gives NaN, -inf gives 0.
inline float exponential(float x) {
    const float clamped = std::min(std::max(x, LEAST_EXPONENT), 88.72283f);
    const float whole = std::floor(clamped * 1.44269504f + 0.5f);
    const float rest = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * rest + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    // 2^whole in two factors: whole reaches 128, and one factor's exponent only 127.
    const int32_t half = static_cast<int32_t>(whole) >> 1;
    const int32_t other = static_cast<int32_t>(whole) - half;
    const uint32_t a = static_cast<uint32_t>(half + 127) << 23;
    const uint32_t b = static_cast<uint32_t>(other + 127) << 23;
    float first, second;
    std::memcpy(&first, &a, sizeof first);
    std::memcpy(&second, &b, sizeof second);
    const float result = x < LEAST_EXPONENT ? 0.0f : y * first * second;
    return x != x ? x : result;
}

// x times the sigmoid of x.
inline float silu(float x) { return x / (1.0f + exponential(-x)); }

// tanh, within 4 units in the last place; a polynomial where 1 - 2 / (exp(2 x) + 1) cancels. It
// vectorises as `exponential` does.
inline float hyperbolic(float x) {
    const float square = x * x;
    float y = 62.0f / 2835;
    y = y * square - 17.0f / 315;
    y = y * square + 2.0f / 15;
    y = y * square - 1.0f / 3;
    const float near = x + x * square * y;
    const float far = 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
    return square < 0.0625f ? near : far;
}

// softcap * tanh(score / softcap).
inline float capped(float score, float softcap) { return softcap * hyperbolic(score / softcap); }

}  // namespace
