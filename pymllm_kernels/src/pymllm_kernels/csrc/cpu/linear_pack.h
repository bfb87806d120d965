// What the dwords of a packed weight hold. Mirrored in Python.
#pragma once

#include <cstdint>

namespace pymllm {

enum PackFormat : int64_t {
    kPackBf16 = 0,  // a pair of bf16
    kPackW8A8 = 1,  // four int8 codes as uint8, offset by 128: vpdpbusd multiplies uint8 by int8
    kPackInt4 = 2,  // Int4Codes in unpack.h
    kPackInt8 = 3,  // Int8Codes in unpack.h
};

}  // namespace pymllm
