"""Commands on other machines, over SSH, and on this one in the same way.

`transport` is the module to read first: an argv in, a Result out; it also has this machine. `node` is the same over SSH. `pool` keeps the
connections, `connection` opens one, `target` and `ssh_config` say where to and with which keys, `known_hosts` which host keys are known;
`hostkey_check` refuses any other.
`channel` carries one command, `log_writer` writes the output of long ones, `parallel` runs many nodes side by side.
"""
