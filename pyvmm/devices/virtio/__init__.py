# Virtio devices (virtio 1.2, OASIS) on virtio-mmio. Imported when a VM is given one, never before.
"""`specs.make()` builds one out of its description; docs/design.md, "Virtio"."""
