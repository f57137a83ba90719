# pyvmm: what a program or a student may call, listed in one place. Imported lazily: `import pyvmm` costs nothing.
"""A userspace mini-hypervisor on /dev/kvm."""
