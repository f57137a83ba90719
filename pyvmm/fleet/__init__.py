# fleet: many VMs on one host that has less memory than they were promised (technique T2, US9529609B2).
"""What is decided is pure: demand, entitle, states, means, policies, plan, admission, and a simulator of all that. The
daemon (daemon.py, member.py, folder.py) asks the VMs' control sockets and sets what was decided. docs/fleet.md tells
people how to use it and how to write a policy."""
