"""`megabase doctor`: what is wrong with a machine or a cluster login, before a training or a job finds it out."""
