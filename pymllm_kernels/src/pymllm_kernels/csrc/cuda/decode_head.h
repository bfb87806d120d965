// A head's 16-bit numbers as lanes hold them, and their norm and rotation.
#pragma once

namespace {

constexpr int kDim = PYMLLM_DIM;
constexpr int kPieces = kDim / 8;  // of 16 bytes in a row
constexpr int kParts = kDim / 32;  // pieces of a head that one lane of four holds

// One 16-byte load.
DEVICE uint4 load_piece(const uint16_t* pointer) { return *reinterpret_cast<const uint4*>(pointer); }

DEVICE void widen(float (&x)[8], uint4 piece) {
    const uint32_t pairs[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 two = unpack(pairs[i]);
        x[2 * i] = two.x;
        x[2 * i + 1] = two.y;
    }
}

DEVICE uint4 narrow(const float (&x)[8]) {
    return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

// The rotation of one position, rounded as numbers of the computation: dimensions 32 j + 8 part + 0..7, j < kParts / 2.
struct Angles {
    uint4 cos[kParts / 2], sin[kParts / 2];
};

DEVICE uint4 load_rounded(const float* pointer) {
    const float4 a = *reinterpret_cast<const float4*>(pointer), b = *reinterpret_cast<const float4*>(pointer + 4);
    return make_uint4(pack(a.x, a.y), pack(a.z, a.w), pack(b.x, b.y), pack(b.z, b.w));
}

// RMSNorm and rotation of a head that four lanes hold, with the roundings of `nn.ops`. Piece j of lane `part` has
// the dimensions 32 j + 8 part + 0..7, so that a lane holds both numbers of each rotated pair. All lanes call it,
// and agree on `norms`: whether any of them has a norm.
DEVICE void norm_rotate(uint4 (&head)[kParts], const uint4 (&gain)[kParts], bool norms, bool norm,
                        const Angles& angles, float eps) {
    float x[kParts][8];
#pragma unroll
    for (int j = 0; j < kParts; ++j) widen(x[j], head[j]);
    if (norms) {
        float four[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // sums side by side, not one after another
#pragma unroll
        for (int j = 0; j < kParts; ++j)
#pragma unroll
            for (int i = 0; i < 8; ++i) four[i % 4] += x[j][i] * x[j][i];
        float squares = (four[0] + four[1]) + (four[2] + four[3]);
        squares += across(squares, 1);
        squares += across(squares, 2);
        const float scale = inverse_root(squares * (1.0f / kDim) + eps);
#pragma unroll
        for (int j = 0; j < kParts; ++j) {
#pragma unroll
            for (int i = 0; i < 8; ++i) x[j][i] *= scale;
            const uint4 even = narrow(x[j]);
            if (norm)
                head[j] = make_uint4(multiply_pair(even.x, gain[j].x), multiply_pair(even.y, gain[j].y),
                                     multiply_pair(even.z, gain[j].z), multiply_pair(even.w, gain[j].w));
            widen(x[j], head[j]);
        }
    }
#pragma unroll
    for (int j = 0; j < kParts / 2; ++j) {
        float cos[8], sin[8];
        widen(cos, angles.cos[j]);
        widen(sin, angles.sin[j]);
        float(&low)[8] = x[j], (&high)[8] = x[j + kParts / 2];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float turned = low[i] * cos[i] - high[i] * sin[i];
            high[i] = high[i] * cos[i] + low[i] * sin[i];
            low[i] = turned;
        }
        head[j] = narrow(low);
        head[j + kParts / 2] = narrow(high);
    }
}

}  // namespace
