"""An agent that looks at screenshots and acts: trajectories, training on actions alone, success by executing them."""
