"""What the tests use and what people run by hand; the tests themselves stand outside.

Stand-ins for devices and libraries (``cuda_host``, ``triton_guard``, ``ptx``, ``stand_ins``),
scripts (``aot``, ``nvcc_report``, ``triton_versions``, ``portable``, ``flash_attn_suite``),
references and data.
"""
