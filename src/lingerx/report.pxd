# The C types of report.py (Cython's pure mode). Nothing else may live here.
# cython: language_level=3

cimport cython


# No Python object inside: nothing for the garbage collector to look at.
@cython.final
cdef class Report:
    cdef int _code                # which outcome
    cdef long long _drained
    cdef long long _unacked       # -1: unknown
    cdef long long _elapsed_ns
    cdef int _error               # 0: none
    cdef bint _lost
