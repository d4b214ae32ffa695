"""What the compiler is told about each SIMD level, spelled as return types.

A Cython function takes no C attributes, but its return type may be any C
name, so a macro in that place carries them. `inlined` functions exist only
inside their callers; a function returning `avx2` compiles everything inlined
into it for AVX2. Compilers without the attributes (MSVC) and other
architectures have the baseline alone.
"""

cdef extern from *:
    """
    #include <float.h>
    #if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \\
        defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || \\
        defined(__NO_SIGNED_ZEROS__) || defined(_M_FP_FAST) || defined(_M_FP_CONTRACT)
      #error "optcore promises IEEE arithmetic bit for bit: build it without -ffast-math"
    #endif
    /* -fsingle-precision-constant */
    typedef char optcore_constants_are_double[sizeof(1.0) == sizeof(double) ? 1 : -1];
    #if defined(FLT_EVAL_METHOD) && FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
      #error "optcore promises each operation rounded to its own type: build it with SSE arithmetic"
    #endif

    #if defined(__GNUC__) || defined(__clang__)
      #define OPTCORE_INLINE __attribute__((always_inline))
      #define OPTCORE_PREFETCH(at) __builtin_prefetch(at, 1)
    #elif defined(_MSC_VER)
      #define OPTCORE_INLINE __forceinline
    #else
      #define OPTCORE_INLINE
    #endif

    #if !defined(OPTCORE_PREFETCH)
      #define OPTCORE_PREFETCH(at) ((void)(at))
    #endif

    #if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
      #define OPTCORE_X86_LEVELS 1
      #define OPTCORE_AVX2 __attribute__((target("avx2")))
      #if defined(__clang__)
        #define OPTCORE_WIDE
      #else
        #define OPTCORE_WIDE ",prefer-vector-width=512"
      #endif
      #define OPTCORE_AVX512 \\
        __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl" OPTCORE_WIDE)))
    #else
      #define OPTCORE_X86_LEVELS 0
      #define OPTCORE_AVX2
      #define OPTCORE_AVX512
    #endif

    #define optcore_inlined OPTCORE_INLINE void
    #define optcore_baseline void
    #define optcore_avx2 OPTCORE_AVX2 void
    #define optcore_avx512 OPTCORE_AVX512 void
    """
    ctypedef void inlined "optcore_inlined"
    ctypedef void baseline "optcore_baseline"
    ctypedef void avx2 "optcore_avx2"
    ctypedef void avx512 "optcore_avx512"
    const bint X86_LEVELS "OPTCORE_X86_LEVELS"
    # In `inlined` functions only: GCC takes another that does nothing else for one without effect
    void prefetch "OPTCORE_PREFETCH"(const void *at) noexcept nogil
