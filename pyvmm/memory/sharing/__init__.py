# sharing: technique T5 (US9977747B2): what equal pages would free, before any large page is broken; and freeing it.
"""`table`: a hash of each small page. `estimate`: what they say. `scanner`: goes round. `sharer`: breaks, drops, merges
by KSM. `ksm`: the kernel's settings and figures. Each is imported by who uses it: estimates need numpy."""
