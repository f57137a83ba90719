# migration: a VM in motion, from one process to another. docs/migration-protocol.md is what both ends agree on.
"""The protocol and its connections: frames, their order, the hello, addresses, transports, captures. Knows no VM."""
