# control: the control socket of one VM: what other processes ask of it, and how they ask.
"""`pyvmm.control.control.Control` in the VM's process, `pyvmm.control.client.Client` in others. Imported when used."""
