"""What `dermaflow doctor` looks at: is this machine, and what it is to reach, fit for work?"""
