"""`omnilaunch render`: a run as a folder of scripts, for sites where no SSH is allowed.

`render` writes the folder and is the module to read first. `node_script` makes the script of each node and the one that builds the image:
node.sh and build.sh, with the values of the plan above them. `readme` writes the steps for the person who carries the folder.
"""
