// The arguments of the decode attention; pymllm_kernels/cuda/decode_library.py has the same structure.
#pragma once

#include <cstdint>

// Strides in numbers, not bytes. Rows begin at multiples of 16 bytes.
struct DecodeArguments {
    const uint16_t* q;           // [batch, (heads + 2 kv_heads) dim], or [batch, heads, dim] where nothing is prepared
    int64_t q_stride;            // of a sequence
    const int64_t* positions;    // [batch]
    const float* cos_sin;        // [positions, dim], cosines then sines
    const uint16_t* q_weight;    // [dim] or null: no norm
    const uint16_t* k_weight;    // likewise
    const int64_t* slots;        // [batch] where the new token goes; negative: nowhere
    uint16_t* k_cache;           // [slots, kv_heads, dim]
    uint16_t* v_cache;
    int64_t cache_stride;        // of a slot
    uint16_t* out;               // [batch, heads, dim]
    const int32_t* page_table;   // [batch, table_stride]
    int64_t table_stride;
    const int32_t* kv_lens;      // [batch], with the new token
    float* partial;              // [batch kv_heads splits / cluster, group, dim], where clusters meet
    float* stats;                // [batch kv_heads splits / cluster, group, 2]
    int32_t* counters;           // [batch kv_heads], zeros; they are zeros again afterwards
    float scale;                 // of q k, times log2(e)
    float eps;                   // of the norms
    int32_t batch;
    int32_t kv_heads;
    int32_t group;               // query heads of a KV head, at most 16
    int32_t page_shift;          // log2 of a page's tokens
    int32_t splits_shift;        // log2 of the parts of a sequence, at most
    int32_t least;               // blocks that a part has at least; a block is 16 tokens a warp
    int32_t prepare;             // q is the projection: norms, rotation and the cache write are done here
    int32_t cluster_shift;       // log2 of the splits that are a thread block cluster: 0 (none) to 4
    int32_t pdl;                 // start before the kernel before this one has ended
    int32_t warps;               // 4 or 8
};
