# migrating: a running VM moves to another VMM process. docs/migration-protocol.md is what both sides keep to.
"""`Outgoing`: the source's side; `Incoming`: the destination's. What goes over the wire is in pyvmm.migration."""
