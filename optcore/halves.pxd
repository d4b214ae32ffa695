"""The half types, one element at a time: exactly to float32, and from it, rounded once.

Bits of the right form are put together by integers, so that neither the processor's rounding mode
nor its flushing of subnormals reaches them. What is rounded was computed: a NaN of it is quiet, and
stays one.
"""
from libc.stdint cimport int16_t, int32_t, uint16_t, uint32_t

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    static inline uint32_t optcore_bits_of(float x) {
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        return bits;
    }
    static inline float optcore_float_of(uint32_t bits) {
        float x;
        memcpy(&x, &bits, sizeof x);
        return x;
    }
    """
    uint32_t bits_of "optcore_bits_of"(float x) noexcept nogil
    float float_of "optcore_float_of"(uint32_t bits) noexcept nogil


cdef inline uint32_t magnitude(uint32_t bits) noexcept nogil:
    return bits & 0x7FFFFFFF


cdef inline uint32_t either(bint first, uint32_t one, uint32_t other) noexcept nogil:
    """Choose without a branch, which beside float operations keeps a compiler from vectors."""
    return other ^ ((one ^ other) & (0 - <uint32_t>first))


cdef inline uint32_t to_even(uint32_t fixed) noexcept nogil:
    """What rounds a number with 16 fractional bits to the nearest, ties to even, once added."""
    return 0x7FFF + ((fixed >> 16) & 1)


cdef inline float from_bfloat16(uint16_t half) noexcept nogil:
    return float_of(<uint32_t>half << 16)


cdef inline uint32_t settled(float x) noexcept nogil:
    """The bits; a NaN becomes the plain one, for rounding might carry it on to zero.

    What was computed is no signalling NaN, whose bits are smaller than those of the plain one.
    """
    cdef uint32_t bits = bits_of(x)
    cdef int32_t capped
    bits = <uint32_t>0xFFC00000 if bits > <uint32_t>0xFFC00000 else bits
    capped = <int32_t>bits
    return <uint32_t>(0x7FC00000 if capped > 0x7FC00000 else capped)


cdef inline uint16_t to_bfloat16(
    float x, const bint stochastic, uint32_t noise
) noexcept nogil:
    """Round to the nearest, or up with the fraction's probability by 16 bits of noise."""
    cdef uint32_t bits = settled(x)
    return (bits + (noise if stochastic else to_even(bits))) >> 16


cdef inline float from_float16(uint16_t half) noexcept nogil:
    cdef uint32_t bits = (<uint32_t>half & 0x7FFF) << 13
    cdef uint32_t exponent = bits & 0x0F800000
    cdef uint32_t sign = (<uint32_t>half & 0x8000) << 16
    cdef float subnormal = float_of(bits + 0x38800000) - float_of(0x38800000)   # exact
    cdef uint32_t normal = bits + (0x70000000 if exponent == 0x0F800000 else 0x38000000)
    return float_of(either(exponent == 0, magnitude(bits_of(subnormal)), normal) | sign)


cdef inline uint16_t to_float16(
    float x, const bint stochastic, uint32_t noise
) noexcept nogil:
    """Round to the nearest, or up with the fraction's probability by 16 bits of noise.

    In stochastic rounding of what becomes subnormal, that probability is cut after 16 bits.
    """
    cdef uint32_t size = magnitude(bits_of(x))
    cdef uint32_t sign = (bits_of(x) >> 16) & 0x8000
    # in units of the half's last place with 16 fractional bits; exact, but for what is cut off
    cdef bint subnormal = size < 0x38800000
    cdef float scaled = float_of(either(subnormal, size, 0)) * <float>1099511627776     # 2**40
    cdef uint32_t below = <uint32_t><int32_t>scaled
    cdef uint32_t fixed
    if not stochastic:
        below |= <float><int32_t>below != scaled        # no tie
    fixed = either(subnormal, below, (size - 0x38000000) << 3)
    fixed += noise if stochastic else to_even(fixed)
    fixed = either(size >= 0x47800000, 0x7C000000, fixed)
    return sign | either(size > 0x7F800000, 0x7E000000, fixed) >> 16


# A float32 in two: the bfloat16 nearest to it, ties away from zero, and its low 16 bits. Nothing is
# lost but what a NaN carries.

cdef inline uint16_t high_of(float x) noexcept nogil:
    return (settled(x) + 0x8000) >> 16


cdef inline uint16_t low_of(float x) noexcept nogil:
    return settled(x)


cdef inline float joined(uint16_t high, uint16_t low) noexcept nogil:
    """The float32 of two halves, on the upper one's side of zero and infinity, if that was set."""
    cdef uint32_t bits = <uint32_t>high << 16
    cdef int32_t shown = magnitude(bits)
    cdef int32_t size = shown + <int16_t>low
    cdef int32_t most = shown if shown > 0x7F800000 else 0x7F800000
    size = 0 if size < 0 else size
    size = most if size > most else size
    return float_of((bits & <uint32_t>0x80000000) | <uint32_t>size)
