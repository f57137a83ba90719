# reclaim: what of a VM's memory goes when there is less than it would use. Nothing here needs KVM. Unit: small pages.
"""`policy`: who chooses, and how one is found by its name; `policies`: those that pyvmm brings.

`trace`: accesses, in a file; `simulator`: what a policy costs on a trace; `opt`: the least that any costs; `synthetic`:
traces that no VM made.
"""
