// csrc/cuda/decode_kernel.h for the CPU, with the C functions of decode_attention.cu. Blocks of a grid run one after
// another, the last split first, those of a cluster together.
#include "emulated_cuda.h"

#include "decode_kernel.h"

namespace {

template <int kWarps>
struct Run {
    const DecodeArguments& a;

    template <int kColumns, bool kSpare>
    int operator()() const {
        const int ranks = 1 << a.cluster_shift;
        const int bytes = shared_bytes<kWarps>() + inbox_floats(ranks, a.group) * 4;
        for (int sequence = 0; sequence < a.batch; ++sequence)
            for (int head = 0; head < a.kv_heads; ++head)
                for (int split = (1 << a.splits_shift) - ranks; split >= 0; split -= ranks)
                    emulated::run(ranks, kWarps * 32, bytes, [&](int rank, int thread) {
                        decode<kWarps, kColumns, kSpare>(a, split + rank, head, sequence, thread,
                                                                 emulated::shared_of(rank));
                    });
        return 0;
    }
};

}  // namespace

extern "C" int pymllm_decode_attention_set_up() { return 0; }

extern "C" int pymllm_decode_attention(const DecodeArguments* a, void*) {
    if (a->group < 1 || a->group > kMaxGroup || a->batch < 1 || a->cluster_shift > a->splits_shift || (a->warps != 4 && a->warps != 8)) return 1;
    return a->warps == 4 ? for_group(a->group, Run<4>{*a}) : for_group(a->group, Run<8>{*a});
}
