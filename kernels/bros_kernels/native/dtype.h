/* Numbers as activations, keys, values and the weights of norms hold them. Sums are float32 whatever they are. */
#ifndef BROS_DTYPE_H
#define BROS_DTYPE_H

#include <stdint.h>

enum bros_dtype { BROS_BF16 = 0, BROS_FLOAT32 = 1 };

static inline int64_t number_bytes(int dtype) { return dtype == BROS_BF16 ? 2 : 4; }

/* Where number `index` of `numbers` is. */
static inline void *number_at(const void *numbers, int64_t index, int dtype)
{
    return (char *)numbers + index * number_bytes(dtype);
}

/* CASE(dtype), which the compiler then knows. */
#define FOR_DTYPE(DTYPE, CASE)                                                                                 \
    switch (DTYPE) {                                                                                           \
        case BROS_BF16: CASE(BROS_BF16); break; case BROS_FLOAT32: CASE(BROS_FLOAT32); break;                  \
    }

#endif
