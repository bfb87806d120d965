// csrc/cuda/decode_attention.cu for the CPU, with the library's own C functions. Blocks of a grid run one after
// another, the last split first, those of a cluster together.
#define PYMLLM_EMULATED
#include "decode_attention.cu"

namespace {

template <int kWarps, int kStages, int kColumns>
void run_grid(const DecodeArguments& a) {
    const int ranks = a.cluster ? a.splits : 1;
    for (int sequence = 0; sequence < a.batch; ++sequence)
        for (int head = 0; head < a.kv_heads; ++head)
            for (int split = a.splits - ranks; split >= 0; split -= ranks)
                emulated::run(ranks, kWarps * 32, shared_bytes<kWarps, kStages>(), [&](int rank, int thread) {
                    decode<kWarps, kStages, kColumns>(a, split + rank, head, sequence, thread,
                                                      emulated::shared_of(rank));
                });
}

template <int kWarps, int kStages>
void run_group(const DecodeArguments& a) {
    a.group <= 8 ? run_grid<kWarps, kStages, 1>(a) : run_grid<kWarps, kStages, 2>(a);
}

}  // namespace

extern "C" int pymllm_decode_attention_set_up() { return 0; }

extern "C" int pymllm_decode_attention(const DecodeArguments* a, void*) {
    if (a->group < 1 || a->group > kMaxGroup || a->batch < 1 || (a->warps != 4 && a->warps != 8)) return 1;
    a->warps == 4 ? run_group<4, 2>(*a) : run_group<8, 2>(*a);
    return 0;
}
