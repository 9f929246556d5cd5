# What Cython's memoryviews need, for the other compiled modules: nothing to call.
__pyx_capi__: dict[str, object]
__test__: dict[str, str]
